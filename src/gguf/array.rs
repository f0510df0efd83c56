//! Arrays in metadata, kept as the file encodes them: a vocabulary of 150,000 tokens is one allocation
//! and is decoded when somebody asks for it.

use std::fmt;

use super::{MAX_ARRAY_DEPTH, Value, ValueType, cursor::Cursor, value::encode_str};
use crate::{Error, Result};

/// An array of values of one type; arrays of arrays too, at most four levels.
#[derive(Clone, PartialEq, Eq)]
pub struct Array {
    ty: ValueType,
    len: usize,
    /// The elements as a file holds them, without type and count. Checked whenever an `Array` is made.
    raw: Vec<u8>,
}

impl Array {
    /// An array of `values`, all of type `ty`.
    pub fn new(ty: ValueType, values: &[Value]) -> Result<Array> {
        let mut raw = Vec::new();
        for (i, value) in values.iter().enumerate() {
            if value.ty() != ty {
                return Err(Error::invalid(
                    format!("array element {i}"),
                    ty.name(),
                    value.describe(),
                    "an array holds one type",
                ));
            }
            value.encode(&mut raw);
        }
        let array = Array { ty, len: values.len(), raw };
        let mut encoded = Vec::new();
        array.encode(&mut encoded);
        Array::decode(&mut Cursor::new(&encoded, "array")).map_err(|_| {
            let most = format!("arrays at most {MAX_ARRAY_DEPTH} deep");
            Error::invalid("array", most, "a deeper one", "flatten it")
        })
    }

    /// An array of strings.
    pub fn strings<S: AsRef<str>>(values: impl IntoIterator<Item = S>) -> Array {
        let mut array = Array { ty: ValueType::String, len: 0, raw: Vec::new() };
        for text in values {
            encode_str(text.as_ref(), &mut array.raw);
            array.len += 1;
        }
        array
    }

    /// The elements' type.
    pub fn ty(&self) -> ValueType {
        self.ty
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements in order, each decoded as it is reached.
    pub fn iter(&self) -> impl Iterator<Item = Value> + '_ {
        let mut from = Cursor::new(&self.raw, "array");
        (0..self.len).map(move |_| Value::decode(self.ty, &mut from).expect("checked when made"))
    }

    /// The elements of an array of strings, without copies; `None` for any other.
    pub fn as_strs(&self) -> Option<Vec<&str>> {
        let mut from = Cursor::new(&self.raw, "array");
        (self.ty == ValueType::String)
            .then(|| (0..self.len).map(|_| from.string().expect("checked when made")).collect())
    }

    /// Reads type, count and elements.
    pub(super) fn decode(from: &mut Cursor) -> Result<Array> {
        let ty = ValueType::decode(from)?;
        let len = from.count("array elements", ty.least_bytes())?;
        let start = from.position();
        skip_elements(ty, len, 1, from)?;
        Ok(Array { ty, len: len as usize, raw: from.since(start).to_vec() })
    }

    /// Appends type, count and elements.
    pub(super) fn encode(&self, to: &mut Vec<u8>) {
        to.extend(self.ty.raw().to_le_bytes());
        to.extend((self.len as u64).to_le_bytes());
        to.extend(&self.raw);
    }
}

/// Walks over `len` elements at `depth` arrays deep and checks them.
fn skip_elements(ty: ValueType, len: u64, depth: usize, from: &mut Cursor) -> Result<()> {
    match ty {
        ValueType::Array if depth == MAX_ARRAY_DEPTH => {
            return Err(from.invalid(format!("arrays at most {depth} deep"), "a deeper one"));
        }
        ValueType::Array => {
            for _ in 0..len {
                let inner = ValueType::decode(from)?;
                let len = from.count("array elements", inner.least_bytes())?;
                skip_elements(inner, len, depth + 1, from)?;
            }
        }
        ValueType::String => {
            for _ in 0..len {
                from.string()?;
            }
        }
        ValueType::Bool => {
            for _ in 0..len {
                from.bool()?;
            }
        }
        number => {
            from.take(len * number.least_bytes())?;
        }
    }
    Ok(())
}

impl fmt::Display for Array {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "array of {} {}", self.len, self.ty)
    }
}

impl fmt::Debug for Array {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

macro_rules! array_from {
    ($($rust:ty => $variant:ident),*) => {$(
        impl From<&[$rust]> for Array {
            fn from(values: &[$rust]) -> Array {
                let raw = values.iter().flat_map(|x| x.to_le_bytes()).collect();
                Array { ty: ValueType::$variant, len: values.len(), raw }
            }
        }
    )*};
}

array_from!(u8 => U8, i8 => I8, u16 => U16, i16 => I16, u32 => U32, i32 => I32, f32 => F32, u64 => U64,
    i64 => I64, f64 => F64);
