//! llama.cpp's file types, and which type its quantiser gives each tensor.

use std::ffi::CString;
use std::fmt;
use std::str::FromStr;

use ggml_sys as sys;

use super::{Model, check};
use crate::ggml::Type;
use crate::{Error, Result};

/// What `llama-quantize` calls a type: a mixture of tensor types, e.g. `q4_k_m`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct FileType {
    name: &'static str,
    raw: u32,
    main: u32,
}

macro_rules! file_types {
    ($($name:literal $file:ident $main:ident,)*) => {
        /// (name on the command line, `enum llama_ftype`, the type of most tensors).
        const FILE_TYPES: &[FileType] = &[$(FileType {
            name: $name,
            raw: sys::$file as u32,
            main: sys::$main as u32,
        },)*];
    };
}

file_types! {
    "f32" LLAMA_FTYPE_ALL_F32 GGML_TYPE_F32,
    "f16" LLAMA_FTYPE_MOSTLY_F16 GGML_TYPE_F16,
    "bf16" LLAMA_FTYPE_MOSTLY_BF16 GGML_TYPE_BF16,
    "q8_0" LLAMA_FTYPE_MOSTLY_Q8_0 GGML_TYPE_Q8_0,
    "q6_k" LLAMA_FTYPE_MOSTLY_Q6_K GGML_TYPE_Q6_K,
    "q5_k_m" LLAMA_FTYPE_MOSTLY_Q5_K_M GGML_TYPE_Q5_K,
    "q5_k_s" LLAMA_FTYPE_MOSTLY_Q5_K_S GGML_TYPE_Q5_K,
    "q5_1" LLAMA_FTYPE_MOSTLY_Q5_1 GGML_TYPE_Q5_1,
    "q5_0" LLAMA_FTYPE_MOSTLY_Q5_0 GGML_TYPE_Q5_0,
    "q4_k_m" LLAMA_FTYPE_MOSTLY_Q4_K_M GGML_TYPE_Q4_K,
    "q4_k_s" LLAMA_FTYPE_MOSTLY_Q4_K_S GGML_TYPE_Q4_K,
    "q4_1" LLAMA_FTYPE_MOSTLY_Q4_1 GGML_TYPE_Q4_1,
    "q4_0" LLAMA_FTYPE_MOSTLY_Q4_0 GGML_TYPE_Q4_0,
    "iq4_nl" LLAMA_FTYPE_MOSTLY_IQ4_NL GGML_TYPE_IQ4_NL,
    "iq4_xs" LLAMA_FTYPE_MOSTLY_IQ4_XS GGML_TYPE_IQ4_XS,
    "q3_k_l" LLAMA_FTYPE_MOSTLY_Q3_K_L GGML_TYPE_Q3_K,
    "q3_k_m" LLAMA_FTYPE_MOSTLY_Q3_K_M GGML_TYPE_Q3_K,
    "q3_k_s" LLAMA_FTYPE_MOSTLY_Q3_K_S GGML_TYPE_Q3_K,
    "iq3_m" LLAMA_FTYPE_MOSTLY_IQ3_M GGML_TYPE_IQ3_S,
    "iq3_s" LLAMA_FTYPE_MOSTLY_IQ3_S GGML_TYPE_IQ3_S,
    "iq3_xs" LLAMA_FTYPE_MOSTLY_IQ3_XS GGML_TYPE_IQ3_S,
    "iq3_xxs" LLAMA_FTYPE_MOSTLY_IQ3_XXS GGML_TYPE_IQ3_XXS,
    "q2_k" LLAMA_FTYPE_MOSTLY_Q2_K GGML_TYPE_Q2_K,
    "q2_k_s" LLAMA_FTYPE_MOSTLY_Q2_K_S GGML_TYPE_Q2_K,
    "iq2_m" LLAMA_FTYPE_MOSTLY_IQ2_M GGML_TYPE_IQ2_S,
    "iq2_s" LLAMA_FTYPE_MOSTLY_IQ2_S GGML_TYPE_IQ2_XS,
    "iq2_xs" LLAMA_FTYPE_MOSTLY_IQ2_XS GGML_TYPE_IQ2_XS,
    "iq2_xxs" LLAMA_FTYPE_MOSTLY_IQ2_XXS GGML_TYPE_IQ2_XXS,
    "iq1_m" LLAMA_FTYPE_MOSTLY_IQ1_M GGML_TYPE_IQ1_M,
    "iq1_s" LLAMA_FTYPE_MOSTLY_IQ1_S GGML_TYPE_IQ1_S,
    "tq2_0" LLAMA_FTYPE_MOSTLY_TQ2_0 GGML_TYPE_TQ2_0,
    "tq1_0" LLAMA_FTYPE_MOSTLY_TQ1_0 GGML_TYPE_TQ1_0,
}

impl FileType {
    /// All of them, the largest first.
    pub fn all() -> impl Iterator<Item = FileType> {
        FILE_TYPES.iter().copied()
    }

    /// The name on the command line, e.g. `q4_k_m`.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// The value of `general.file_type`.
    pub fn raw(self) -> u32 {
        self.raw
    }

    /// The type of most of its tensors.
    pub fn main(self) -> Type {
        Type::from_raw(self.main).expect("a type of the table above")
    }

    /// All names, for errors and help.
    pub fn names() -> String {
        FILE_TYPES.iter().map(|t| t.name).collect::<Vec<_>>().join(", ")
    }
}

impl FromStr for FileType {
    type Err = Error;

    /// Reads a name in any case; `q5_k`, `q4_k` and `q3_k` mean the medium ones, as for `llama-quantize`.
    fn from_str(text: &str) -> Result<FileType> {
        let mut name = text.to_ascii_lowercase();
        if ["q5_k", "q4_k", "q3_k"].contains(&name.as_str()) {
            name.push_str("_m");
        }
        FileType::all().find(|t| t.name == name).ok_or_else(|| Error::Unsupported {
            what: "type",
            got: text.into(),
            supported: FileType::names(),
        })
    }
}

impl fmt::Display for FileType {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl fmt::Debug for FileType {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name)
    }
}

/// A tensor as a file's table has it.
pub struct TensorEntry<'a> {
    /// Name.
    pub name: &'a str,
    /// Its present type.
    pub ty: Type,
    /// Extents, ggml order, ones behind.
    pub shape: [u64; 4],
}

impl Model {
    /// The type that llama.cpp's quantiser gives each tensor of this model in a file of type `ftype`,
    /// without an importance matrix. Tensors in the quantiser's order: by layer, then by name.
    ///
    /// # Errors
    /// [`Error::Engine`] with llama.cpp's own words.
    pub fn quantised_types(&self, ftype: FileType, tensors: &[TensorEntry]) -> Result<Vec<Type>> {
        let names: Vec<CString> =
            tensors.iter().map(|t| CString::new(t.name).expect("a GGUF name has no NUL")).collect();
        let entries: Vec<_> = names
            .iter()
            .zip(tensors)
            .map(|(name, t)| sys::bupo_tensor_entry {
                name: name.as_ptr(),
                type_: t.ty.raw(),
                ne: t.shape.map(|n| n as i64),
            })
            .collect();
        let mut types = vec![0u32; tensors.len()];
        // SAFETY: a live model; entries with NUL-terminated names, known types and extents that the reader
        // checked; room for as many results.
        let status = unsafe {
            sys::bupo_quantize_types(
                self.raw(),
                ftype.raw as i32,
                entries.as_ptr(),
                entries.len(),
                types.as_mut_ptr(),
            )
        };
        check("choosing tensor types", status, "choose another --type")?;
        Ok(types.into_iter().map(|raw| Type::from_raw(raw).expect("ggml's own type")).collect())
    }
}
