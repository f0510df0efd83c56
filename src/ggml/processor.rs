//! Whether this processor has what the program was compiled for, and which of ggml's CPU backends computes.

use std::ffi::CStr;

use ggml_sys as sys;

use crate::{Error, Result};

/// Extensions that code may be compiled for: name, whether this program is, and its bit.
#[cfg(target_arch = "x86_64")]
const EXTENSIONS: [(&str, bool, u32); 7] = [
    ("avx2", cfg!(target_feature = "avx2"), sys::BUPO_CPU_AVX2),
    ("fma", cfg!(target_feature = "fma"), sys::BUPO_CPU_FMA),
    ("bmi2", cfg!(target_feature = "bmi2"), sys::BUPO_CPU_BMI2),
    ("avx512f", cfg!(target_feature = "avx512f"), sys::BUPO_CPU_AVX512F),
    ("avx512bw", cfg!(target_feature = "avx512bw"), sys::BUPO_CPU_AVX512BW),
    ("avx512vl", cfg!(target_feature = "avx512vl"), sys::BUPO_CPU_AVX512VL),
    ("avx512vnni", cfg!(target_feature = "avx512vnni"), sys::BUPO_CPU_AVX512VNNI),
];
#[cfg(not(target_arch = "x86_64"))]
const EXTENSIONS: [(&str, bool, u32); 0] = [];

/// Refuses a processor without the extensions that the program was compiled for, on which it would die of an illegal
/// instruction.
///
/// # Errors
/// [`Error::Invalid`] naming the extensions.
pub fn check_processor() -> Result<()> {
    // SAFETY: no preconditions.
    let has = unsafe { sys::bupo_cpu_features() };
    missing(has).map_or(Ok(()), |names| {
        let advice = "build it on this machine, or take a portable build (docs/INSTALL.md)";
        Err(Error::invalid(
            "this program",
            format!("a processor with {names}"),
            "one without",
            advice,
        ))
    })
}

/// Names of the extensions that the program needs beyond these.
fn missing(has: u32) -> Option<String> {
    let missing = EXTENSIONS.iter().filter(|&&(_, needed, bit)| needed && has & bit == 0);
    let names: Vec<&str> = missing.map(|(name, ..)| *name).collect();
    (!names.is_empty()).then(|| names.join(", "))
}

/// The CPU backend that computes: `baseline`, or what it was compiled for beyond the program (feature `portable`). The first
/// call chooses it, for good.
pub fn cpu_backend() -> &'static str {
    // SAFETY: no preconditions; the name is static text.
    unsafe { CStr::from_ptr(sys::bupo_cpu_init()) }.to_str().unwrap_or("unknown")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_without_an_extension_is_refused_by_its_name() {
        check_processor().unwrap();
        for &(name, needed, bit) in &EXTENSIONS {
            let said = missing(!bit);
            assert_eq!(said.as_deref(), needed.then_some(name));
        }
    }
}
