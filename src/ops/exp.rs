//! An exponential that vectorises: the logprob op takes one per vocabulary entry and token.

/// `e^x` to 2 ulp-ish relative error (below 3e-7); 0 below -87.3, and finite up to 88.7.
///
/// `e^x = 2^n e^r` with `n = round(x / ln 2)`, `|r| <= ln 2 / 2`, and a polynomial of degree 6 for `e^r`.
/// Written without branches so that a loop over it becomes SIMD code.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = x.clamp(-87.3, 88.7);
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let mut p = 1.0 / 720.0;
    p = f32::mul_add(p, r, 1.0 / 120.0);
    p = f32::mul_add(p, r, 1.0 / 24.0);
    p = f32::mul_add(p, r, 1.0 / 6.0);
    p = f32::mul_add(p, r, 0.5);
    p = f32::mul_add(p, r, 1.0);
    p = f32::mul_add(p, r, 1.0);
    // 2^n in two halves, so that n = 128 does not overflow the exponent.
    let bits = shifted.to_bits() as i32 - ROUND.to_bits() as i32;
    let half = bits >> 1;
    let scale = |e: i32| f32::from_bits(((e + 127) << 23) as u32);
    p * scale(half) * scale(bits - half)
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn agrees_with_the_library() {
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3;
            let exact = (x as f64).exp();
            let error = (exp(x) as f64 - exact).abs() / exact;
            assert!(error < 3e-7, "exp({x}): {error}");
        }
        assert!(exp(-1000.0) < 2e-38);
        assert!(exp(f32::NEG_INFINITY) < 2e-38);
    }
}
