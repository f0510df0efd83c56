//! Metadata by key and Rust type.

use super::{GgufFile, Value, shown};
use crate::{Error, Result};

/// A Rust type that a metadata value can be read as, without loss.
pub trait FromValue<'a>: Sized {
    /// What the value must be, for errors.
    const EXPECTED: &'static str;

    /// The value as this type; `None` when it is of another type or out of range.
    fn from_value(value: &'a Value) -> Option<Self>;
}

macro_rules! integers {
    ($($rust:ty),*) => {$(
        impl FromValue<'_> for $rust {
            const EXPECTED: &'static str = concat!("an integer in the range of ", stringify!($rust));

            fn from_value(value: &Value) -> Option<$rust> {
                value.integer().and_then(|x| x.try_into().ok())
            }
        }
    )*};
}

integers!(u32, i32, u64, usize);

impl FromValue<'_> for f32 {
    const EXPECTED: &'static str = "f32";

    fn from_value(value: &Value) -> Option<f32> {
        match *value {
            Value::F32(x) => Some(x),
            Value::F64(x) if f64::from(x as f32) == x => Some(x as f32),
            _ => None,
        }
    }
}

impl FromValue<'_> for bool {
    const EXPECTED: &'static str = "bool";

    fn from_value(value: &Value) -> Option<bool> {
        match *value {
            Value::Bool(x) => Some(x),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for &'a str {
    const EXPECTED: &'static str = "string";

    fn from_value(value: &'a Value) -> Option<&'a str> {
        match value {
            Value::String(x) => Some(x),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for Vec<&'a str> {
    const EXPECTED: &'static str = "array of string";

    fn from_value(value: &'a Value) -> Option<Vec<&'a str>> {
        match value {
            Value::Array(array) => array.as_strs(),
            _ => None,
        }
    }
}

macro_rules! arrays {
    ($($rust:ty),*) => {$(
        impl FromValue<'_> for Vec<$rust> {
            const EXPECTED: &'static str = concat!("array of ", stringify!($rust));

            fn from_value(value: &Value) -> Option<Vec<$rust>> {
                match value {
                    Value::Array(array) => array.iter().map(|x| FromValue::from_value(&x)).collect(),
                    _ => None,
                }
            }
        }
    )*};
}

arrays!(u32, i32, f32, bool);

impl GgufFile {
    /// The value of `key` as a `T`; `None` when the file has no such key.
    ///
    /// # Errors
    /// When the value is there and is no `T`.
    pub fn find<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match T::from_value(value) {
            Some(x) => Ok(Some(x)),
            None => Err(self.wrong(key, T::EXPECTED, value.describe())),
        }
    }

    /// The value of `key` as a `T`.
    ///
    /// # Errors
    /// When the file has no such key or its value is no `T`.
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T> {
        self.find(key)?.ok_or_else(|| self.wrong(key, T::EXPECTED, "no such key".to_owned()))
    }

    /// An integer, of whatever width, that a u32 can hold.
    pub fn u32(&self, key: &str) -> Result<u32> {
        self.require(key)
    }

    /// An f32, or an f64 that an f32 can hold.
    pub fn f32(&self, key: &str) -> Result<f32> {
        self.require(key)
    }

    /// A string.
    pub fn str(&self, key: &str) -> Result<&str> {
        self.require(key)
    }

    /// A bool.
    pub fn bool(&self, key: &str) -> Result<bool> {
        self.require(key)
    }

    /// An array of strings.
    pub fn strings(&self, key: &str) -> Result<Vec<&str>> {
        self.require(key)
    }

    /// `general.architecture`, e.g. `qwen3`.
    pub fn architecture(&self) -> Result<&str> {
        self.require("general.architecture")
    }

    fn wrong(&self, key: &str, expected: &str, got: String) -> Error {
        Error::invalid(
            format!("{}: key '{}'", self.name(), shown(key)),
            expected,
            got,
            "convert the model to GGUF again",
        )
    }
}
