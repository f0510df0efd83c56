//! Exponentials that vectorise: the ops take one per vocabulary entry and token, or per score.
//!
//! Written without branches, so that loops over them become SIMD code.

use pulp::Simd;

const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;

/// `x = n ln 2 + r` with an integer n, `|r| <= ln 2 / 2`; x within +-100.
#[inline(always)]
fn reduce(x: f32) -> (i32, f32) {
    // Adding and subtracting 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    (shifted.to_bits() as i32 - ROUND.to_bits() as i32, r)
}

/// 2^n, n from -126 to 127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) << 23) as u32)
}

/// `e^x` to a relative error below 1e-7; 0 below -87.3, and finite up to 88.7.
///
/// `e^x = 2^n e^r` and a polynomial of degree 7 for `e^r`.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let (n, r) = reduce(x.clamp(-87.3, 88.7));
    let mut p = 1.0 / 5040.0;
    p = f32::mul_add(p, r, 1.0 / 720.0);
    p = f32::mul_add(p, r, 1.0 / 120.0);
    p = f32::mul_add(p, r, 1.0 / 24.0);
    p = f32::mul_add(p, r, 1.0 / 6.0);
    p = f32::mul_add(p, r, 0.5);
    p = f32::mul_add(p, r, 1.0);
    p = f32::mul_add(p, r, 1.0);
    // 2^n in two halves, so that n = 128 does not overflow the exponent.
    let half = n >> 1;
    p * power_of_two(half) * power_of_two(n - half)
}

/// `e^x` of every lane, x at most 88, to a relative error below 1e-7; 0 below -87.7. As [`exp`], in the widest vectors.
#[inline(always)]
pub(super) fn exp_lanes<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    // Rounds as in `reduce`; the integer in the low bits is n + 127, the exponent's bits of 2^n: of -88 it is 0.
    const ROUND: f32 = 12_582_912.0 + 127.0;
    let splat = |x: f32| simd.splat_f32s(x);
    // This way round a NaN stays one.
    let x = simd.max_f32s(splat(-88.0), x);
    let shifted = simd.mul_add_e_f32s(x, splat(std::f32::consts::LOG2_E), splat(ROUND));
    let n = simd.sub_f32s(shifted, splat(ROUND));
    let r = simd.mul_add_e_f32s(n, splat(-LN2_LOW), simd.mul_add_e_f32s(n, splat(-LN2_HIGH), x));
    let mut p = splat(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = simd.mul_add_e_f32s(p, r, splat(c));
    }
    let bits = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(23));
    simd.mul_f32s(p, simd.transmute_f32s_u32s(bits))
}

/// `tanh x` and its slope `1 - tanh^2 x`, each to a relative error below 5e-7: small x keep their digits, and
/// so does the slope where tanh is 1.
///
/// With `t = e^(-2 |x|) = 2^n (1 + q)`, `q = e^r - 1`: `tanh |x| = (1 - t) / (1 + t)`, slope `4 t / (1 + t)^2`.
#[inline(always)]
pub(super) fn tanh(x: f32) -> (f32, f32) {
    let (n, r) = reduce((-2.0 * x.abs()).clamp(-87.3, 0.0));
    let mut p = 1.0 / 5040.0;
    p = f32::mul_add(p, r, 1.0 / 720.0);
    p = f32::mul_add(p, r, 1.0 / 120.0);
    p = f32::mul_add(p, r, 1.0 / 24.0);
    p = f32::mul_add(p, r, 1.0 / 6.0);
    p = f32::mul_add(p, r, 0.5);
    p = f32::mul_add(p, r, 1.0);
    let q = p * r;
    let scale = power_of_two(n);
    let (t, less) = (scale.mul_add(q, scale), (1.0 - scale) - scale * q); // less = 1 - t
    let inverse = 1.0 / (1.0 + t);
    ((less * inverse).copysign(x), 4.0 * t * inverse * inverse)
}

/// `c tanh(x / c)`, which bends x to within +-c, and its slope.
#[inline(always)]
pub(super) fn softcap(x: f32, c: f32) -> (f32, f32) {
    let (tanh, slope) = tanh(x / c);
    (c * tanh, slope)
}

#[cfg(test)]
mod tests {
    use super::{exp, exp_lanes, softcap, tanh};

    #[test]
    fn agrees_with_the_library() {
        for i in -87_000..88_000 {
            let x = i as f32 * 1e-3;
            let exact = (x as f64).exp();
            let error = (exp(x) as f64 - exact).abs() / exact;
            assert!(error < 1e-7, "exp({x}): {error}");
        }
        assert!(exp(-1000.0) < 2e-38);
        assert!(exp(f32::NEG_INFINITY) < 2e-38);
    }

    #[test]
    fn lanes_agree_with_the_library() {
        struct All([f32; 64]);
        impl pulp::WithSimd for All {
            type Output = [f32; 64];
            fn with_simd<S: pulp::Simd>(mut self, simd: S) -> [f32; 64] {
                for lanes in S::as_mut_simd_f32s(&mut self.0).0 {
                    *lanes = exp_lanes(simd, *lanes);
                }
                self.0
            }
        }
        let all = |x: [f32; 64]| pulp::Arch::new().dispatch(All(x));
        for first in (-87_000..88_000).step_by(64) {
            let x: [f32; 64] =
                std::array::from_fn(|i| (first + i as i32).min(88_000) as f32 * 1e-3);
            for (x, got) in x.into_iter().zip(all(x)) {
                let exact = (x as f64).exp();
                let error = (got as f64 - exact).abs() / exact;
                assert!(error < 1e-7, "exp({x}): {error}");
            }
        }
        assert_eq!(all([-88.0; 64]), [0.0; 64]);
        assert_eq!(all([f32::NEG_INFINITY; 64]), [0.0; 64]);
        assert_eq!(all([0.0; 64]), [1.0; 64]);
        assert!(all([f32::NAN; 64]).iter().all(|x| x.is_nan()));
    }

    #[test]
    fn tanh_and_its_slope_keep_their_digits() {
        let mut x = 1e-20f32;
        while x < 43.0 {
            let exact = x as f64;
            let want = [exact.tanh(), exact.cosh().powi(-2)];
            for sign in [1.0, -1.0] {
                let (y, slope) = tanh(sign * x);
                for (got, want) in [(sign * y, want[0]), (slope, want[1])] {
                    let error = (got as f64 - want).abs() / want;
                    assert!(error < 5e-7, "tanh({x}): {got} of {want}, {error}");
                }
            }
            x *= 1.0003;
        }
        assert_eq!(tanh(0.0), (0.0, 1.0));
        for x in [50.0, 1e30, f32::INFINITY] {
            assert_eq!((tanh(x).0, tanh(-x).0), (1.0, -1.0));
            assert!(tanh(x).1 < 1e-37);
        }
        assert!(tanh(f32::NAN).0.is_nan() && tanh(f32::NAN).1.is_nan());
    }

    #[test]
    fn a_softcap_bends_and_does_not_break() {
        assert_eq!(softcap(1000.0, 30.0).0, 30.0);
        let (y, slope) = softcap(-15.0, 30.0);
        assert!((y + 30.0 * 0.5f32.tanh()).abs() < 1e-5 && (slope - 0.786_448).abs() < 1e-6);
    }
}
