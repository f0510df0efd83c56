//! F32 rows to any type that ggml can quantise to.

use ggml_sys as sys;

use super::Type;

impl Type {
    /// Whether F32 rows can be turned into this type (the list of `ggml_quantize_chunk`, which aborts on
    /// any other).
    pub fn can_quantize(self) -> bool {
        const TYPES: [sys::ggml_type; 28] = [
            sys::GGML_TYPE_F32,
            sys::GGML_TYPE_F16,
            sys::GGML_TYPE_BF16,
            sys::GGML_TYPE_Q1_0,
            sys::GGML_TYPE_Q2_0,
            sys::GGML_TYPE_Q4_0,
            sys::GGML_TYPE_Q4_1,
            sys::GGML_TYPE_Q5_0,
            sys::GGML_TYPE_Q5_1,
            sys::GGML_TYPE_Q8_0,
            sys::GGML_TYPE_MXFP4,
            sys::GGML_TYPE_NVFP4,
            sys::GGML_TYPE_Q2_K,
            sys::GGML_TYPE_Q3_K,
            sys::GGML_TYPE_Q4_K,
            sys::GGML_TYPE_Q5_K,
            sys::GGML_TYPE_Q6_K,
            sys::GGML_TYPE_TQ1_0,
            sys::GGML_TYPE_TQ2_0,
            sys::GGML_TYPE_IQ2_XXS,
            sys::GGML_TYPE_IQ2_XS,
            sys::GGML_TYPE_IQ2_S,
            sys::GGML_TYPE_IQ3_XXS,
            sys::GGML_TYPE_IQ3_S,
            sys::GGML_TYPE_IQ1_S,
            sys::GGML_TYPE_IQ1_M,
            sys::GGML_TYPE_IQ4_NL,
            sys::GGML_TYPE_IQ4_XS,
        ];
        TYPES.contains(&(self.raw() as sys::ggml_type))
    }

    /// Whether ggml quantises to this type only with the importance of each column.
    pub fn needs_importance(self) -> bool {
        // SAFETY: a `Type` holds a number ggml knows.
        unsafe { sys::ggml_quantize_requires_imatrix(self.raw() as sys::ggml_type) }
    }

    /// Quantises whole rows of `width` by ggml's own quantiser, on the calling thread.
    ///
    /// `importance: [width]` weighs each column's squared error, where the type's quantiser heeds it.
    /// `out` gets exactly the rows' blocks.
    ///
    /// # Errors
    /// In words, when a value is not finite or became so (beyond the range of the type).
    ///
    /// # Panics
    /// When lengths do not agree, the type cannot be quantised to ([`Type::can_quantize`]), or needs an
    /// importance that is not given.
    pub fn quantize(
        self,
        rows: &[f32],
        width: usize,
        importance: Option<&[f32]>,
        out: &mut [u8],
    ) -> Result<(), String> {
        assert!(self.can_quantize(), "{self} cannot be quantised to");
        assert!(importance.is_some() || !self.needs_importance(), "{self} without importance");
        assert!(importance.is_none_or(|i| i.len() == width), "importance of {width} columns");
        assert!(rows.len().is_multiple_of(width.max(1)), "whole rows of {width}");
        let row_bytes = self.row_bytes(width).unwrap_or_else(|| panic!("{self} row of {width}"));
        let n_rows = rows.len() / width.max(1);
        assert_eq!(out.len(), row_bytes * n_rows, "{self}: room for {n_rows} rows of {width}");
        if let Some(x) = rows.iter().find(|x| !x.is_finite()) {
            return Err(format!("{x} among the values"));
        }
        if n_rows == 0 {
            return Ok(());
        }
        // SAFETY: `rows` holds n_rows * width finite floats, a multiple of the block size per row; `out`
        // has room for as many blocks; the importance, if any, has `width` values; the type is one that
        // ggml_quantize_chunk knows. Its tables are made under ggml's own lock.
        let valid = unsafe {
            sys::ggml_quantize_chunk(
                self.raw() as sys::ggml_type,
                rows.as_ptr(),
                out.as_mut_ptr().cast(),
                0,
                n_rows as i64,
                width as i64,
                importance.map_or(std::ptr::null(), <[f32]>::as_ptr),
            );
            sys::ggml_validate_row_data(
                self.raw() as sys::ggml_type,
                out.as_ptr().cast(),
                out.len(),
            )
        };
        if !valid {
            let largest = rows.iter().fold(0f32, |m, x| m.max(x.abs()));
            return Err(format!("values up to {largest:e}, beyond what {self} can hold"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> impl Iterator<Item = Type> {
        Type::all().filter(|t| t.can_quantize())
    }

    #[test]
    fn every_type_of_the_list_comes_back_near() {
        let width = 512;
        let rows: Vec<f32> =
            (0..4 * width).map(|i| ((i * 37 % 101) as f32 - 50.0) / 500.0).collect();
        let importance: Vec<f32> = (0..width).map(|i| 1.0 + (i % 7) as f32).collect();
        let square = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>();
        let mut n = 0;
        for ty in all() {
            let mut bytes = vec![0; ty.row_bytes(rows.len()).unwrap()];
            ty.quantize(&rows, width, Some(&importance), &mut bytes).unwrap();
            let mut back = vec![0.0; rows.len()];
            ty.dequantize(&bytes, &mut back);
            let error: Vec<f32> = back.iter().zip(&rows).map(|(b, r)| b - r).collect();
            // The error of a type of b bits a weight: at most that of 1.5 bits.
            let relative = (square(&error) / square(&rows)).sqrt();
            assert!(relative < 0.75, "{ty}: {relative}");
            n += 1;
        }
        assert_eq!(n, 28, "types of ggml_quantize_chunk");
    }

    #[test]
    fn what_is_not_finite_is_an_error() {
        let mut bytes = [0; 34];
        let mut rows = [0.5; 32];
        rows[7] = f32::NAN;
        let error = Type::Q8_0.quantize(&rows, 32, None, &mut bytes).unwrap_err();
        assert_eq!(error, "NaN among the values");
        rows[7] = 1e30;
        let error = Type::Q8_0.quantize(&rows, 32, None, &mut bytes).unwrap_err();
        assert_eq!(error, "values up to 1e30, beyond what q8_0 can hold");
        let mut halves = [0; 64];
        assert!(Type::F16.quantize(&rows, 32, None, &mut halves).is_err());
    }
}
