//! Metadata values, and how the file encodes them.

use std::fmt;

use super::{Array, cursor::Cursor, shown};
use crate::Result;

/// The type of a metadata value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[allow(missing_docs)]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    /// Every type, at the index of its number in a file.
    pub const ALL: [ValueType; 13] = {
        use ValueType::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64]
    };

    /// The type with this number in a file.
    pub fn from_raw(raw: u32) -> Option<ValueType> {
        ValueType::ALL.get(raw as usize).copied()
    }

    /// The number in a file.
    pub fn raw(self) -> u32 {
        self as u32
    }

    /// E.g. `u32`, `string`.
    pub fn name(self) -> &'static str {
        const NAMES: [&str; 13] = [
            "u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64",
            "f64",
        ];
        NAMES[self as usize]
    }

    /// The fewest bytes a value of this type takes: all of it for a number, the length of a string, the
    /// type and length of an array.
    pub(super) fn least_bytes(self) -> u64 {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => 1,
            ValueType::U16 | ValueType::I16 => 2,
            ValueType::U32 | ValueType::I32 | ValueType::F32 => 4,
            ValueType::U64 | ValueType::I64 | ValueType::F64 | ValueType::String => 8,
            ValueType::Array => 12,
        }
    }

    /// Reads a type's number.
    pub(super) fn decode(from: &mut Cursor) -> Result<ValueType> {
        let raw = from.u32()?;
        ValueType::from_raw(raw)
            .ok_or_else(|| from.invalid("a value type in 0..=12", raw.to_string()))
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A metadata value. Floats compare as floats do: NaN is unequal to itself.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl Value {
    /// Its type.
    pub fn ty(&self) -> ValueType {
        match self {
            Value::U8(_) => ValueType::U8,
            Value::I8(_) => ValueType::I8,
            Value::U16(_) => ValueType::U16,
            Value::I16(_) => ValueType::I16,
            Value::U32(_) => ValueType::U32,
            Value::I32(_) => ValueType::I32,
            Value::F32(_) => ValueType::F32,
            Value::Bool(_) => ValueType::Bool,
            Value::String(_) => ValueType::String,
            Value::Array(_) => ValueType::Array,
            Value::U64(_) => ValueType::U64,
            Value::I64(_) => ValueType::I64,
            Value::F64(_) => ValueType::F64,
        }
    }

    /// The integer it holds; `None` for anything else.
    pub fn integer(&self) -> Option<i128> {
        match *self {
            Value::U8(x) => Some(x.into()),
            Value::I8(x) => Some(x.into()),
            Value::U16(x) => Some(x.into()),
            Value::I16(x) => Some(x.into()),
            Value::U32(x) => Some(x.into()),
            Value::I32(x) => Some(x.into()),
            Value::U64(x) => Some(x.into()),
            Value::I64(x) => Some(x.into()),
            _ => None,
        }
    }

    /// Type and value in one short line, for errors: `string 'lora'`, `array of 3 u32`.
    pub fn describe(&self) -> String {
        match self {
            Value::String(text) => format!("string '{}'", shown(text)),
            Value::Array(array) => array.to_string(),
            number => format!("{} {number}", number.ty()),
        }
    }

    /// Reads a value of type `ty`.
    pub(super) fn decode(ty: ValueType, from: &mut Cursor) -> Result<Value> {
        Ok(match ty {
            ValueType::U8 => Value::U8(u8::from_le_bytes(from.fixed()?)),
            ValueType::I8 => Value::I8(i8::from_le_bytes(from.fixed()?)),
            ValueType::U16 => Value::U16(u16::from_le_bytes(from.fixed()?)),
            ValueType::I16 => Value::I16(i16::from_le_bytes(from.fixed()?)),
            ValueType::U32 => Value::U32(u32::from_le_bytes(from.fixed()?)),
            ValueType::I32 => Value::I32(i32::from_le_bytes(from.fixed()?)),
            ValueType::F32 => Value::F32(f32::from_le_bytes(from.fixed()?)),
            ValueType::Bool => Value::Bool(from.bool()?),
            ValueType::String => Value::String(from.string()?.to_owned()),
            ValueType::Array => Value::Array(Array::decode(from)?),
            ValueType::U64 => Value::U64(u64::from_le_bytes(from.fixed()?)),
            ValueType::I64 => Value::I64(i64::from_le_bytes(from.fixed()?)),
            ValueType::F64 => Value::F64(f64::from_le_bytes(from.fixed()?)),
        })
    }

    /// Appends the value, without its type, as a file holds it.
    pub(super) fn encode(&self, to: &mut Vec<u8>) {
        match self {
            Value::U8(x) => to.extend(x.to_le_bytes()),
            Value::I8(x) => to.extend(x.to_le_bytes()),
            Value::U16(x) => to.extend(x.to_le_bytes()),
            Value::I16(x) => to.extend(x.to_le_bytes()),
            Value::U32(x) => to.extend(x.to_le_bytes()),
            Value::I32(x) => to.extend(x.to_le_bytes()),
            Value::F32(x) => to.extend(x.to_le_bytes()),
            Value::Bool(x) => to.push(u8::from(*x)),
            Value::String(x) => encode_str(x, to),
            Value::Array(x) => x.encode(to),
            Value::U64(x) => to.extend(x.to_le_bytes()),
            Value::I64(x) => to.extend(x.to_le_bytes()),
            Value::F64(x) => to.extend(x.to_le_bytes()),
        }
    }
}

/// Appends a string as a file holds it: its length in bytes, its bytes.
pub(super) fn encode_str(text: &str, to: &mut Vec<u8>) {
    to.extend((text.len() as u64).to_le_bytes());
    to.extend(text.as_bytes());
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Value::U8(x) => x.fmt(f),
            Value::I8(x) => x.fmt(f),
            Value::U16(x) => x.fmt(f),
            Value::I16(x) => x.fmt(f),
            Value::U32(x) => x.fmt(f),
            Value::I32(x) => x.fmt(f),
            Value::F32(x) => x.fmt(f),
            Value::Bool(x) => x.fmt(f),
            Value::String(x) => x.fmt(f),
            Value::Array(x) => x.fmt(f),
            Value::U64(x) => x.fmt(f),
            Value::I64(x) => x.fmt(f),
            Value::F64(x) => x.fmt(f),
        }
    }
}

macro_rules! value_from {
    ($($rust:ty => $variant:ident),*) => {$(
        impl From<$rust> for Value {
            fn from(x: $rust) -> Value {
                Value::$variant(x)
            }
        }
    )*};
}

value_from!(u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, f32 => F32, bool => Bool,
    String => String, Array => Array, u64 => U64, i64 => I64, f64 => F64);

impl From<&str> for Value {
    fn from(text: &str) -> Value {
        Value::String(text.to_owned())
    }
}
