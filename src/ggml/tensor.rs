//! Tensors and the arenas that hold their headers.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::ffi::{CStr, CString, c_int, c_void};
use std::marker::PhantomData;
use std::ptr::NonNull;

use ggml_sys as sys;

use super::Type;

/// Extents of a tensor in ggml order `[ne0, ne1, ne2, ne3]`; unused ones are 1.
pub type Shape = [usize; 4];

/// A tensor header: type, shape, strides and where the data lies. Copying it copies the reference.
///
/// `'a` is the life of the arena (or model) that holds the header.
#[derive(Clone, Copy)]
pub struct Tensor<'a> {
    raw: NonNull<sys::ggml_tensor>,
    owner: PhantomData<&'a sys::ggml_tensor>,
}

// SAFETY: a `Tensor` is a reference to a header and its data. Whoever computes on it does so through
// `Executor`, which takes `&mut self`; weights are never written.
unsafe impl Send for Tensor<'_> {}
// SAFETY: as above.
unsafe impl Sync for Tensor<'_> {}

impl<'a> Tensor<'a> {
    /// Wraps a pointer of ggml.
    ///
    /// # Safety
    /// `raw` is a valid tensor header for all of `'a`, and so is its data, if it has any.
    pub(crate) unsafe fn from_raw(raw: *mut sys::ggml_tensor) -> Tensor<'a> {
        Tensor { raw: NonNull::new(raw).expect("a tensor header"), owner: PhantomData }
    }

    /// ggml's pointer.
    pub(crate) fn raw(self) -> *mut sys::ggml_tensor {
        self.raw.as_ptr()
    }

    fn header(&self) -> &sys::ggml_tensor {
        // SAFETY: the header lives as long as 'a.
        unsafe { self.raw.as_ref() }
    }

    /// `[ne0, ne1, ne2, ne3]`.
    pub fn shape(&self) -> Shape {
        self.header().ne.map(|n| n as usize)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape().iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element type.
    pub fn ty(&self) -> Type {
        Type::from_ggml(self.header().type_).expect("a live tensor has a known type")
    }

    /// Name, e.g. `blk.0.attn_q.weight`; empty when it has none.
    pub fn name(&self) -> &'a str {
        // SAFETY: the name is a NUL-terminated array inside the header, which lives as long as 'a.
        unsafe { CStr::from_ptr(self.raw.as_ref().name.as_ptr()) }.to_str().unwrap_or("?")
    }

    /// Whether rows follow each other without gaps.
    pub fn is_contiguous(&self) -> bool {
        // SAFETY: a valid header.
        unsafe { sys::ggml_is_contiguous(self.raw()) }
    }

    /// Bytes of the data.
    pub fn n_bytes(&self) -> usize {
        // SAFETY: a valid header.
        unsafe { sys::ggml_nbytes(self.raw()) }
    }

    /// Where the data lies, to tell tensors apart; null before it is allocated.
    pub fn address(&self) -> *const u8 {
        self.data()
    }

    /// Address of the data in host memory; null before it is allocated.
    pub(crate) fn data(&self) -> *mut u8 {
        self.header().data.cast()
    }

    /// The buffer that holds the data; null before it is allocated.
    pub(crate) fn buffer(&self) -> sys::ggml_backend_buffer_t {
        self.header().buffer
    }

    /// Whether the data lies in memory that the CPU reads directly.
    pub fn is_host(&self) -> bool {
        let buffer = self.header().buffer;
        // SAFETY: a buffer pointer in a live header is valid.
        !self.header().data.is_null()
            && (buffer.is_null() || unsafe { sys::ggml_backend_buffer_is_host(buffer) })
    }

    /// Copies the elements out. F32, contiguous, with data.
    pub(crate) fn read_f32(&self) -> Vec<f32> {
        let mut out = vec![0f32; self.len()];
        self.read_f32_into(&mut out);
        out
    }

    /// Copies the elements into `out`, which has as many.
    pub(crate) fn read_f32_into(&self, out: &mut [f32]) {
        assert_eq!(self.ty(), Type::F32, "read of {}", self.name());
        assert!(self.is_contiguous() && out.len() == self.len(), "read of {}", self.name());
        assert!(!self.data().is_null(), "{} has no data", self.name());
        // SAFETY: contiguous, allocated, and `out` has exactly n_bytes bytes.
        unsafe {
            sys::ggml_backend_tensor_get(self.raw(), out.as_mut_ptr().cast(), 0, self.n_bytes())
        }
    }

    /// Overwrites all elements. F32, contiguous, with data, as many elements as `values`.
    pub(crate) fn write_f32(&self, values: &[f32]) {
        assert_eq!(self.ty(), Type::F32, "write of {}", self.name());
        // SAFETY: f32 has no padding, and any byte of it may be read.
        self.write_bytes(unsafe {
            std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values))
        });
    }

    /// Overwrites all elements. I32, contiguous, with data, as many elements as `values`.
    pub(crate) fn write_i32(&self, values: &[i32]) {
        assert_eq!(self.ty(), Type::I32, "write of {}", self.name());
        // SAFETY: i32 has no padding, and any byte of it may be read.
        self.write_bytes(unsafe {
            std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values))
        });
    }

    /// Overwrites the data with as many raw bytes.
    pub(crate) fn write_bytes(&self, bytes: &[u8]) {
        assert!(self.is_contiguous() && bytes.len() == self.n_bytes(), "write of {}", self.name());
        assert!(!self.data().is_null(), "{} has no data", self.name());
        // SAFETY: contiguous, allocated, and exactly n_bytes bytes are given.
        unsafe { sys::ggml_backend_tensor_set(self.raw(), bytes.as_ptr().cast(), 0, bytes.len()) }
    }
}

impl std::fmt::Debug for Tensor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} {} {:?}", self.name(), self.ty(), self.shape())
    }
}

/// The CPU side of an op of ours: called by every thread of the backend with its index.
pub(crate) type Kernel =
    unsafe extern "C" fn(dst: *mut sys::ggml_tensor, ith: c_int, nth: c_int, userdata: *mut c_void);

/// Where ggml keeps a custom node's count of threads, behind the address of its kernel.
const N_TASKS: usize = size_of::<usize>() / size_of::<i32>();

/// Parts that the work of a node of ours is cut into where the order of sums depends on it: as many as the executor's pool
/// has threads, of which fewer may be at work.
///
/// # Safety
/// A live node of an op of ours that an executor runs.
pub(crate) unsafe fn parts(node: *const sys::ggml_tensor) -> usize {
    // SAFETY: by contract.
    unsafe { (*node).op_params[N_TASKS] as usize }
}

/// The last of a node's parameters, far behind what ggml keeps of a custom one: whether its products may round numbers.
const ROUNDED: usize = sys::GGML_MAX_OP_PARAMS as usize / size_of::<i32>() - 1;

/// Whether products with weights may take numbers of 16 bits of significand, where the processor is quicker with them.
///
/// # Safety
/// As of [`parts`].
pub(crate) unsafe fn rounded(node: *const sys::ggml_tensor) -> bool {
    // SAFETY: by contract.
    unsafe { (*node).op_params[ROUNDED] != 0 }
}

/// Sets [`parts`] and [`rounded`] of a node, if it is an op of ours.
///
/// # Safety
/// A live node that nobody computes.
pub(super) unsafe fn set_up(node: *mut sys::ggml_tensor, parts: usize, rounded: bool) {
    // SAFETY: by contract.
    unsafe {
        if (*node).op == sys::GGML_OP_CUSTOM {
            (*node).op_params[N_TASKS] = parts as i32;
            (*node).op_params[ROUNDED] = rounded as i32;
        }
    }
}

/// Holds tensor headers (a ggml context without data) and the parameters of our ops.
///
/// Its methods build nodes of a graph; they are spread over this folder and `ops/` by subject.
/// They panic when shapes or types do not fit: that is a bug of the caller, since everything that
/// comes from a file was checked before.
pub struct Arena {
    context: NonNull<sys::ggml_context>,
    capacity: usize,
    used: Cell<usize>,
    params: RefCell<Vec<Box<dyn Any>>>,
}

// SAFETY: an arena is used by one thread at a time (it is not Sync); nothing in it is bound to a thread.
unsafe impl Send for Arena {}

impl Arena {
    /// Room for `capacity` tensor headers and one graph.
    pub fn new(capacity: usize) -> Arena {
        // SAFETY: plain size queries and an initialisation with memory that ggml allocates itself.
        let context = unsafe {
            let mem_size = (capacity + 1) * sys::ggml_tensor_overhead()
                + sys::ggml_graph_overhead_custom(capacity, false);
            sys::ggml_init(sys::ggml_init_params {
                mem_size,
                mem_buffer: std::ptr::null_mut(),
                no_alloc: true,
            })
        };
        let context = NonNull::new(context).expect("memory for tensor headers");
        Arena { context, capacity, used: Cell::new(0), params: RefCell::default() }
    }

    pub(crate) fn context(&self) -> *mut sys::ggml_context {
        self.context.as_ptr()
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Counts headers about to be made: ggml aborts when its context is full, we panic before.
    pub(crate) fn reserve(&self, headers: usize) {
        self.used.set(self.used.get() + headers);
        assert!(self.used.get() <= self.capacity, "arena of {} headers is full", self.capacity);
    }

    /// Wraps a node that ggml has just made in this arena's context.
    pub(crate) fn wrap(&self, raw: *mut sys::ggml_tensor) -> Tensor<'_> {
        // SAFETY: the header was made in our context, which lives as long as `self`.
        unsafe { Tensor::from_raw(raw) }
    }

    /// A new tensor header without data, `shape` in ggml order (at most 4 extents).
    pub fn tensor(&self, ty: Type, shape: &[usize]) -> Tensor<'_> {
        assert!((1..=4).contains(&shape.len()), "1 to 4 extents, got {shape:?}");
        assert!(ty.row_bytes(shape[0]).is_some(), "{ty} row of {}", shape[0]);
        let ne: Vec<i64> = shape.iter().map(|&n| n as i64).collect();
        self.reserve(1);
        // SAFETY: 1 to 4 extents, a known type, a whole number of blocks per row, room in the context.
        self.wrap(unsafe {
            sys::ggml_new_tensor(self.context(), ty.raw() as _, ne.len() as c_int, ne.as_ptr())
        })
    }

    /// [`Arena::tensor`] with a name and marked as an input: its memory is not reused in the graph.
    pub fn input(&self, name: &str, ty: Type, shape: &[usize]) -> Tensor<'_> {
        let tensor = self.tensor(ty, shape);
        self.set_name(tensor, name);
        // SAFETY: a valid header.
        unsafe { sys::ggml_set_input(tensor.raw()) };
        tensor
    }

    /// Names a tensor (at most 63 bytes are kept).
    pub fn set_name(&self, tensor: Tensor<'_>, name: &str) {
        let name = CString::new(name.replace('\0', "")).expect("no NUL is left");
        // SAFETY: a valid header; ggml copies and truncates the string.
        unsafe { sys::ggml_set_name(tensor.raw(), name.as_ptr()) };
    }

    /// A node computed by `kernel` on all threads. F32 of `shape`.
    ///
    /// `params` stays alive with the arena; the kernel gets a pointer to it as `userdata`.
    pub(crate) fn custom<P: 'static>(
        &self,
        shape: Shape,
        sources: &[Tensor<'_>],
        kernel: Kernel,
        params: P,
    ) -> Tensor<'_> {
        let mut raw: Vec<_> = sources.iter().map(|t| t.raw()).collect();
        assert!(raw.len() < sys::GGML_MAX_SRC as usize, "too many sources");
        let userdata = self.keep(params);
        self.reserve(1);
        // SAFETY: fewer than GGML_MAX_SRC valid sources; the parameters live as long as the arena.
        self.wrap(unsafe {
            sys::ggml_custom_4d(
                self.context(),
                sys::GGML_TYPE_F32,
                shape[0] as i64,
                shape[1] as i64,
                shape[2] as i64,
                shape[3] as i64,
                raw.as_mut_ptr(),
                raw.len() as c_int,
                Some(kernel),
                sys::GGML_N_TASKS_MAX,
                userdata,
            )
        })
    }

    /// A node that changes `target` in place: its `src[0]` is the target, then the sources follow.
    pub(crate) fn custom_inplace<'a, P: 'static>(
        &'a self,
        target: Tensor<'a>,
        sources: &[Tensor<'_>],
        kernel: Kernel,
        params: P,
    ) -> Tensor<'a> {
        let mut raw: Vec<_> = sources.iter().map(|t| t.raw()).collect();
        assert!(raw.len() < sys::GGML_MAX_SRC as usize - 1, "too many sources");
        let userdata = self.keep(params);
        self.reserve(1);
        // SAFETY: fewer than GGML_MAX_SRC valid sources; the parameters live as long as the arena.
        self.wrap(unsafe {
            sys::ggml_custom_inplace(
                self.context(),
                target.raw(),
                raw.as_mut_ptr(),
                raw.len() as c_int,
                Some(kernel),
                sys::GGML_N_TASKS_MAX,
                userdata,
            )
        })
    }

    fn keep<P: 'static>(&self, params: P) -> *mut c_void {
        let mut kept = Box::new(params);
        let address: *mut P = &mut *kept;
        self.params.borrow_mut().push(kept);
        address.cast()
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: made by ggml_init, freed once; no `Tensor<'_>` of it is left.
        unsafe { sys::ggml_free(self.context.as_ptr()) }
    }
}
