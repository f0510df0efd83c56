//! ggml's own ops, with their premises checked before ggml would abort on them.

use std::ffi::c_int;

use ggml_sys as sys;

use super::{Arena, Shape, Tensor, Type};

/// Rotary position embedding, all that `ggml_rope_ext` takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Rotated dimensions of a head.
    pub n_rot: usize,
    /// Pairs `(i, i + n_rot/2)` (qwen) instead of `(2i, 2i + 1)` (llama).
    pub neox: bool,
    /// Context the model was trained on, for YaRN.
    pub n_ctx_orig: usize,
    /// Base of the frequencies.
    pub freq_base: f32,
    /// Linear scale of positions, 1 / factor.
    pub freq_scale: f32,
    /// YaRN's mix of interpolation and extrapolation; 0 is plain scaling.
    pub ext_factor: f32,
    /// Scale of the rotated values.
    pub attn_factor: f32,
    /// YaRN's ramp, fast end.
    pub beta_fast: f32,
    /// YaRN's ramp, slow end.
    pub beta_slow: f32,
}

fn f32_contiguous(op: &str, tensors: &[Tensor<'_>]) {
    for t in tensors {
        assert!(t.ty() == Type::F32 && t.is_contiguous(), "{op}: F32 and contiguous, got {t:?}");
    }
}

fn same_shape(op: &str, a: Tensor<'_>, b: Tensor<'_>) {
    assert_eq!(a.shape(), b.shape(), "{op}: {a:?} and {b:?}");
}

impl Arena {
    /// `a + b`, equal shapes.
    pub fn add<'a>(&'a self, a: Tensor<'a>, b: Tensor<'a>) -> Tensor<'a> {
        f32_contiguous("add", &[a, b]);
        same_shape("add", a, b);
        self.reserve(1);
        // SAFETY: F32, contiguous, equal shapes; room in the context.
        self.wrap(unsafe { sys::ggml_add(self.context(), a.raw(), b.raw()) })
    }

    /// `x * w`, the row `w: [ne0]` repeated over all rows of `x`; or equal shapes.
    pub fn mul<'a>(&'a self, x: Tensor<'a>, w: Tensor<'a>) -> Tensor<'a> {
        f32_contiguous("mul", &[x, w]);
        let row = [x.shape()[0], 1, 1, 1];
        assert!(w.shape() == row || w.shape() == x.shape(), "mul: {x:?} by {w:?}");
        self.reserve(1);
        // SAFETY: F32, contiguous, w repeats over x; room in the context.
        self.wrap(unsafe { sys::ggml_mul(self.context(), x.raw(), w.raw()) })
    }

    /// `by x`; x itself for 1.
    pub fn scale<'a>(&'a self, x: Tensor<'a>, by: f32) -> Tensor<'a> {
        if by == 1.0 {
            return x;
        }
        f32_contiguous("scale", &[x]);
        self.reserve(1);
        // SAFETY: F32, contiguous; room in the context.
        self.wrap(unsafe { sys::ggml_scale(self.context(), x.raw(), by) })
    }

    /// `x / sqrt(mean(x^2) + eps)` of each row.
    pub fn rms_norm<'a>(&'a self, x: Tensor<'a>, eps: f32) -> Tensor<'a> {
        f32_contiguous("rms_norm", &[x]);
        self.reserve(1);
        // SAFETY: F32, contiguous; room in the context.
        self.wrap(unsafe { sys::ggml_rms_norm(self.context(), x.raw(), eps) })
    }

    /// Cotangent of `x` from `dy`, the cotangent of `rms_norm(x)`.
    pub fn rms_norm_back<'a>(&'a self, dy: Tensor<'a>, x: Tensor<'a>, eps: f32) -> Tensor<'a> {
        f32_contiguous("rms_norm_back", &[dy, x]);
        same_shape("rms_norm_back", dy, x);
        self.reserve(1);
        // SAFETY: F32, contiguous, equal shapes; room in the context.
        self.wrap(unsafe { sys::ggml_rms_norm_back(self.context(), dy.raw(), x.raw(), eps) })
    }

    /// Rotates heads `x: [head size, heads, T]` by `positions: [T]` I32;
    /// `factors: [n_rot/2]` divide the frequencies (llama3's `rope_freqs`).
    pub fn rope<'a>(
        &'a self,
        x: Tensor<'a>,
        positions: Tensor<'a>,
        factors: Option<Tensor<'a>>,
        rope: &Rope,
    ) -> Tensor<'a> {
        self.rope_either(x, positions, factors, rope, sys::ggml_rope_ext)
    }

    /// Cotangent of `x` from `dy`, the cotangent of [`Arena::rope`] of `x`: the rotation backwards.
    pub fn rope_back<'a>(
        &'a self,
        dy: Tensor<'a>,
        positions: Tensor<'a>,
        factors: Option<Tensor<'a>>,
        rope: &Rope,
    ) -> Tensor<'a> {
        self.rope_either(dy, positions, factors, rope, sys::ggml_rope_ext_back)
    }

    fn rope_either<'a>(
        &'a self,
        x: Tensor<'a>,
        positions: Tensor<'a>,
        factors: Option<Tensor<'a>>,
        rope: &Rope,
        node: RopeNode,
    ) -> Tensor<'a> {
        f32_contiguous("rope", &[x]);
        let [head_size, _, n_tokens, _] = x.shape();
        assert!(positions.ty() == Type::I32 && positions.len() == n_tokens, "rope: {positions:?}");
        assert!(
            rope.n_rot.is_multiple_of(2) && rope.n_rot <= head_size,
            "rope: {} of {x:?}",
            rope.n_rot
        );
        if let Some(f) = factors {
            f32_contiguous("rope", &[f]);
            assert!(f.len() >= rope.n_rot / 2, "rope: {f:?} for {}", rope.n_rot);
        }
        let factors = factors.map_or(std::ptr::null_mut(), |f| f.raw());
        self.reserve(1);
        // SAFETY: one I32 position per token, an even n_rot within the head, enough factors.
        self.wrap(unsafe {
            node(
                self.context(),
                x.raw(),
                positions.raw(),
                factors,
                rope.n_rot as c_int,
                if rope.neox { sys::GGML_ROPE_TYPE_NEOX as c_int } else { 0 },
                rope.n_ctx_orig as c_int,
                rope.freq_base,
                rope.freq_scale,
                rope.ext_factor,
                rope.attn_factor,
                rope.beta_fast,
                rope.beta_slow,
            )
        })
    }

    /// ggml's own product `y: [N, T]` of `w: [K, N]` and `x: [K, T]`. With a quantised `w` the CPU rounds
    /// the columns of `x` to 8 bits.
    pub fn mul_mat<'a>(&'a self, w: Tensor<'a>, x: Tensor<'a>) -> Tensor<'a> {
        f32_contiguous("mul_mat", &[x]);
        let ([k, _, a, b], [kx, _, c, d]) = (w.shape(), x.shape());
        assert!(k == kx && [a, b, c, d] == [1; 4], "mul_mat: {w:?} by {x:?}");
        self.reserve(1);
        // SAFETY: matrices with equal rows; room in the context.
        self.wrap(unsafe { sys::ggml_mul_mat(self.context(), w.raw(), x.raw()) })
    }

    /// ggml's own `W^T dy: [K, T]` of `w: [K, N]` and `dy: [N, T]`.
    pub fn out_prod<'a>(&'a self, w: Tensor<'a>, dy: Tensor<'a>) -> Tensor<'a> {
        f32_contiguous("out_prod", &[dy]);
        assert!(w.shape()[1] == dy.shape()[0] && w.shape()[2] == 1, "out_prod: {w:?} by {dy:?}");
        self.reserve(2);
        // SAFETY: as many rows of `w` as `dy`'s have elements; room in the context.
        self.wrap(unsafe {
            let turned = sys::ggml_transpose(self.context(), dy.raw());
            sys::ggml_out_prod(self.context(), w.raw(), turned)
        })
    }

    /// Rows `ids: [n]` I32 of `table: [D, rows]` of any type, as F32 `[D, n]`. Ids must be in range:
    /// ggml aborts on others, so whoever makes a batch checks them.
    pub fn rows<'a>(&'a self, table: Tensor<'a>, ids: Tensor<'a>) -> Tensor<'a> {
        assert!(ids.ty() == Type::I32 && ids.shape()[1] == 1, "rows: {ids:?}");
        assert!(table.ty().can_dequantize() && table.shape()[2] == 1, "rows: {table:?}");
        self.reserve(1);
        // SAFETY: an I32 vector of ids and a matrix of a type with a row converter.
        self.wrap(unsafe { sys::ggml_get_rows(self.context(), table.raw(), ids.raw()) })
    }

    /// Vjp of [`Arena::rows`]: rows of `d: [D, n]` added up at `ids: [n]` of a zero `[D, rows]`.
    pub fn rows_back<'a>(&'a self, d: Tensor<'a>, ids: Tensor<'a>, rows: usize) -> Tensor<'a> {
        f32_contiguous("rows_back", &[d]);
        assert!(ids.ty() == Type::I32 && ids.len() == d.shape()[1], "rows_back: {d:?} at {ids:?}");
        let like = self.tensor(Type::F32, &[d.shape()[0], rows]); // gives the shape only
        self.reserve(1);
        // SAFETY: F32 rows, one I32 id each, and a matrix of as wide rows.
        self.wrap(unsafe {
            sys::ggml_get_rows_back(self.context(), d.raw(), ids.raw(), like.raw())
        })
    }

    /// The same elements in another shape.
    pub fn reshape<'a>(&'a self, x: Tensor<'a>, shape: Shape) -> Tensor<'a> {
        let len: usize = shape.iter().product();
        assert!(x.is_contiguous() && x.len() == len, "{x:?} as {shape:?}");
        let [a, b, c, d] = shape.map(|n| n as i64);
        self.reserve(1);
        // SAFETY: contiguous, as many elements; room in the context.
        self.wrap(unsafe { sys::ggml_reshape_4d(self.context(), x.raw(), a, b, c, d) })
    }

    /// Rows `[first, first + n)` of the matrix `x: [D, rows]`, as a view `[D, n]`.
    pub fn row_range<'a>(&'a self, x: Tensor<'a>, first: usize, n: usize) -> Tensor<'a> {
        let [d, rows, ..] = x.shape();
        assert!(x.is_contiguous() && first + n <= rows, "rows {first}+{n} of {x:?}");
        let stride = x.ty().row_bytes(d).expect("a whole number of blocks");
        self.reserve(1);
        // SAFETY: the view lies within x, as just asserted.
        self.wrap(unsafe {
            let (d, n) = (d as i64, n as i64);
            sys::ggml_view_2d(self.context(), x.raw(), d, n, stride, first * stride)
        })
    }

    /// Columns `[first, first + n)` of the rows of the matrix `x: [D, rows]`, as a view `[n, rows]` that is not
    /// contiguous. Both are whole blocks of x's type.
    pub fn column_range<'a>(&'a self, x: Tensor<'a>, first: usize, n: usize) -> Tensor<'a> {
        let [d, rows, ..] = x.shape();
        assert!(x.is_contiguous() && first + n <= d, "columns {first}+{n} of {x:?}");
        let bytes = |n| x.ty().row_bytes(n).expect("a whole number of blocks");
        let (stride, skip) = (bytes(d), bytes(first));
        assert!(n.is_multiple_of(x.ty().block_size()), "columns {first}+{n} of {x:?}");
        self.reserve(1);
        // SAFETY: the view lies within x, as just asserted.
        self.wrap(unsafe {
            sys::ggml_view_2d(self.context(), x.raw(), n as i64, rows as i64, stride, skip)
        })
    }

    /// A matrix with the same elements and no gaps between rows.
    pub fn contiguous<'a>(&'a self, x: Tensor<'a>) -> Tensor<'a> {
        let [d, rows, a, b] = x.shape();
        assert!(x.ty() == Type::F32 && [a, b] == [1; 2], "contiguous copy of {x:?}");
        self.reserve(1);
        // SAFETY: an F32 matrix; room in the context.
        self.wrap(unsafe { sys::ggml_cont_2d(self.context(), x.raw(), d as i64, rows as i64) })
    }

    /// Rows of `a: [n, rows]`, each with that of `b: [m, rows]` behind it.
    pub fn side_by_side<'a>(&'a self, a: Tensor<'a>, b: Tensor<'a>) -> Tensor<'a> {
        f32_contiguous("side_by_side", &[a, b]);
        let ([_, n, c, d], [_, m, e, f]) = (a.shape(), b.shape());
        assert!(n == m && [c, d, e, f] == [1; 4], "{a:?} beside {b:?}");
        self.reserve(1);
        // SAFETY: F32 matrices of as many rows; room in the context.
        self.wrap(unsafe { sys::ggml_concat(self.context(), a.raw(), b.raw(), 0) })
    }

    /// `shape` elements of the contiguous `x` from element `first` on, as a view.
    pub fn part<'a>(&'a self, x: Tensor<'a>, first: usize, shape: [usize; 2]) -> Tensor<'a> {
        assert!(x.ty() == Type::F32 && x.is_contiguous(), "part of {x:?}");
        assert!(first + shape[0] * shape[1] <= x.len(), "{shape:?} from {first} of {x:?}");
        self.reserve(1);
        // SAFETY: the view lies within x, as just asserted.
        self.wrap(unsafe {
            let (n, rows) = (shape[0] as i64, shape[1] as i64);
            sys::ggml_view_2d(self.context(), x.raw(), n, rows, shape[0] * 4, first * 4)
        })
    }

    /// Copies `from` into the memory of `to` (equal number of elements) and gives `to`'s view.
    pub fn copy<'a>(&'a self, from: Tensor<'a>, to: Tensor<'a>) -> Tensor<'a> {
        assert_eq!(from.len(), to.len(), "copy {from:?} to {to:?}");
        self.reserve(1);
        // SAFETY: as many elements on both sides; room in the context.
        self.wrap(unsafe { sys::ggml_cpy(self.context(), from.raw(), to.raw()) })
    }
}

type RopeNode = unsafe extern "C" fn(
    *mut sys::ggml_context,
    *mut sys::ggml_tensor,
    *mut sys::ggml_tensor,
    *mut sys::ggml_tensor,
    c_int,
    c_int,
    c_int,
    f32,
    f32,
    f32,
    f32,
    f32,
    f32,
) -> *mut sys::ggml_tensor;
