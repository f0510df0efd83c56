//! The CPU backend: threads, buffers, and running a graph.

use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::Arc;

use ggml_sys as sys;

use super::{Arena, Shape, Tensor, Type};
use crate::{Error, Result};

/// Worker threads that computations share. Idle ones sleep.
pub struct ThreadPool {
    raw: NonNull<sys::ggml_threadpool>,
    n_threads: usize,
}

// SAFETY: ggml's pool may be handed between threads; one graph at a time runs on it, which the
// owners (`Executor`, `llama::Context`) ensure by `&mut self`.
unsafe impl Send for ThreadPool {}
// SAFETY: as above.
unsafe impl Sync for ThreadPool {}

impl ThreadPool {
    /// Starts `n_threads - 1` workers; the caller of a computation is the last one.
    pub fn new(n_threads: usize) -> Result<ThreadPool> {
        let n_threads = n_threads.clamp(1, sys::GGML_MAX_N_THREADS as usize);
        // SAFETY: default parameters for a count within ggml's limit.
        let raw = unsafe {
            let mut params = sys::ggml_threadpool_params_default(n_threads as i32);
            // By default a worker spins for up to 6.5 million rounds after a graph, on a core that
            // sampling wants: 128 rows of 152k logits on 2 cores took 12 ms so, 7 ms without.
            params.poll = 0;
            sys::ggml_threadpool_new(&mut params)
        };
        let raw = NonNull::new(raw).ok_or_else(|| {
            Error::engine("starting threads", "no thread pool", "try --threads 1")
        })?;
        Ok(ThreadPool { raw, n_threads })
    }

    /// [`ThreadPool::new`] with as many threads as the user asked for, or one per core.
    pub fn with(threads: Option<usize>) -> Result<ThreadPool> {
        let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
        ThreadPool::new(threads.unwrap_or_else(cores))
    }

    /// Number of threads, the caller's included.
    pub fn n_threads(&self) -> usize {
        self.n_threads
    }

    pub(crate) fn raw(&self) -> *mut sys::ggml_threadpool {
        self.raw.as_ptr()
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        // SAFETY: made by ggml_threadpool_new, freed once, no computation runs on it any more.
        unsafe { sys::ggml_threadpool_free(self.raw.as_ptr()) }
    }
}

/// Runs graphs on the CPU; owns the memory of their intermediate results, which is kept and reused.
pub struct Executor {
    backend: sys::ggml_backend_t,
    allocator: sys::ggml_gallocr_t,
    // The graph that the memory belongs to at the moment.
    current: *const sys::ggml_cgraph,
    pool: Arc<ThreadPool>,
}

// SAFETY: all use goes through `&mut self`; nothing in it is bound to a thread.
unsafe impl Send for Executor {}

impl Executor {
    /// An executor on these threads.
    pub fn cpu(pool: Arc<ThreadPool>) -> Result<Executor> {
        // SAFETY: no preconditions; the result is checked.
        let backend = unsafe { sys::ggml_backend_cpu_init() };
        if backend.is_null() {
            return Err(Error::engine("starting the CPU backend", "out of memory", "free some"));
        }
        // SAFETY: a live CPU backend and a live pool, kept alive by the Arc in `self`.
        let allocator = unsafe {
            sys::ggml_backend_cpu_set_n_threads(backend, pool.n_threads() as i32);
            sys::ggml_backend_cpu_set_threadpool(backend, pool.raw());
            sys::ggml_gallocr_new(sys::ggml_backend_cpu_buffer_type())
        };
        Ok(Executor { backend, allocator, current: std::ptr::null(), pool })
    }

    /// Number of threads.
    pub fn n_threads(&self) -> usize {
        self.pool.n_threads()
    }

    /// Bytes that intermediate results take at the moment.
    pub fn scratch_bytes(&self) -> usize {
        // SAFETY: a live allocator with one buffer.
        unsafe { sys::ggml_gallocr_get_buffer_size(self.allocator, 0) }
    }

    /// Gives the graph's tensors memory, fills its inputs, computes it. The same graph may run again
    /// until another one has run: after that its tensors may point into memory that was given back.
    ///
    /// # Panics
    /// When the graph ran before, and another one, or another executor, since.
    ///
    /// # Errors
    /// [`Error::Engine`] when memory for the intermediate results is not to be had.
    pub fn run<'e, 'g>(
        &'e mut self,
        graph: &'e Graph<'g>,
        inputs: &[(Tensor<'g>, Input<'_>)],
    ) -> Result<Computed<'e, 'g>> {
        let own = std::ptr::eq(self.current, graph.raw) && graph.ran_on.get() == self.allocator;
        assert!(graph.ran_on.get().is_null() || own, "a graph that ran is built anew to run later");
        graph.ran_on.set(self.allocator);
        self.current = graph.raw;
        // SAFETY: a live allocator and a graph whose arena is borrowed for 'g, new or the last that ran.
        if !unsafe { sys::ggml_gallocr_alloc_graph(self.allocator, graph.raw) } {
            return Err(Error::engine(
                "allocating a layer's intermediate results",
                "out of memory",
                "lower --micro-batch-tokens",
            ));
        }
        for (tensor, input) in inputs {
            match input {
                Input::F32(values) => tensor.write_f32(values),
                Input::I32(values) => tensor.write_i32(values),
                Input::Bytes(bytes) => tensor.write_bytes(bytes),
            }
        }
        // SAFETY: every tensor of the graph has memory now; kernels were given by this crate.
        let status = unsafe { sys::ggml_backend_graph_compute(self.backend, graph.raw) };
        if status != sys::GGML_STATUS_SUCCESS {
            return Err(Error::engine(
                "computing a graph",
                format!("status {status}"),
                "report it",
            ));
        }
        Ok(Computed { graph, _executor: self })
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        // SAFETY: made in `cpu`, freed once. The pool outlives both by the Arc.
        unsafe {
            sys::ggml_gallocr_free(self.allocator);
            sys::ggml_backend_free(self.backend);
        }
    }
}

/// Values for an input tensor.
pub enum Input<'i> {
    /// For an F32 tensor.
    F32(&'i [f32]),
    /// For an I32 tensor.
    I32(&'i [i32]),
    /// The blocks of a tensor of any type, as they stand in a file.
    Bytes(&'i [u8]),
}

/// A computed graph whose results can be read until the executor runs the next one.
pub struct Computed<'e, 'g> {
    graph: &'e Graph<'g>,
    _executor: &'e mut Executor,
}

impl Computed<'_, '_> {
    /// The values of a node that was marked with [`Graph::output`].
    pub fn f32(&self, node: Tensor<'_>) -> Vec<f32> {
        assert!(self.graph.outputs.contains(&(node.raw() as usize)), "{node:?} is not an output");
        node.read_f32()
    }
}

/// Nodes to be computed, in order.
pub struct Graph<'g> {
    raw: *mut sys::ggml_cgraph,
    arena: &'g Arena,
    outputs: Vec<usize>,
    // The allocator that gave its tensors memory; null before it has run.
    ran_on: Cell<sys::ggml_gallocr_t>,
}

impl<'g> Graph<'g> {
    /// An empty graph over the nodes of an arena; one per arena.
    pub fn new(arena: &'g Arena) -> Graph<'g> {
        // SAFETY: the arena has room for one graph of its capacity.
        let raw = unsafe { sys::ggml_new_graph_custom(arena.context(), arena.capacity(), false) };
        assert!(!raw.is_null(), "one graph per arena");
        Graph { raw, arena, outputs: Vec::new(), ran_on: Cell::new(std::ptr::null_mut()) }
    }

    /// Adds a node and everything it depends on.
    pub fn add(&mut self, node: Tensor<'g>) {
        // SAFETY: a node of our arena; the graph has room for all its headers.
        unsafe { sys::ggml_build_forward_expand(self.raw, node.raw()) }
    }

    /// Adds a node whose values will be read: its memory is not reused.
    pub fn output(&mut self, node: Tensor<'g>) {
        // SAFETY: a valid header.
        unsafe { sys::ggml_set_output(node.raw()) };
        self.outputs.push(node.raw() as usize);
        self.add(node);
    }

    /// Adds a copy of `node` into `target`, a tensor that has memory already.
    pub fn store(&mut self, node: Tensor<'g>, target: Tensor<'g>) {
        assert_eq!(node.len(), target.len(), "store {node:?} into {target:?}");
        let copy = self.arena.copy(node, target);
        self.add(copy);
    }

    /// Bytes that an executor would take for the graph's tensors without data, inputs included.
    pub fn planned_bytes(&self) -> usize {
        let mut bytes = 0;
        // SAFETY: a fresh allocator with one buffer, and a graph whose arena is borrowed; with a place for
        // sizes ggml only reckons: no memory is taken, no tensor changed.
        unsafe {
            let allocator = sys::ggml_gallocr_new(sys::ggml_backend_cpu_buffer_type());
            let ids = std::ptr::null();
            sys::ggml_gallocr_reserve_n_size(allocator, self.raw, ids, ids, &mut bytes);
            sys::ggml_gallocr_free(allocator);
        }
        bytes
    }

    /// Number of nodes.
    pub fn n_nodes(&self) -> usize {
        // SAFETY: a valid graph.
        unsafe { sys::ggml_graph_n_nodes(self.raw) as usize }
    }
}

/// Tensors with memory of their own, zeroed: parameters, gradients, moments, kept activations.
pub struct TensorSet {
    tensors: Vec<NonNull<sys::ggml_tensor>>,
    memory: Arc<Memory>,
}

// SAFETY: headers and buffer are owned; writing goes through `Executor` or `&mut` of the owner.
unsafe impl Send for TensorSet {}
// SAFETY: as above.
unsafe impl Sync for TensorSet {}

/// Headers and data of a [`TensorSet`]; null without tensors.
struct Memory {
    buffer: sys::ggml_backend_buffer_t,
    arena: Arena,
}

// SAFETY: nothing in it is bound to a thread, and the arena is not changed after `TensorSet::zeros`.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl TensorSet {
    /// Allocates F32 tensors in host memory, zeroed.
    ///
    /// # Errors
    /// [`Error::Engine`] with the size when there is not that much memory.
    pub fn zeros(shapes: &[(String, Shape)]) -> Result<TensorSet> {
        let arena = Arena::new(shapes.len());
        let tensors: Vec<_> = shapes
            .iter()
            .map(|(name, shape)| {
                let tensor = arena.tensor(Type::F32, shape);
                arena.set_name(tensor, name);
                NonNull::new(tensor.raw()).expect("a new header")
            })
            .collect();
        let mut buffer = std::ptr::null_mut();
        if !shapes.is_empty() {
            // SAFETY: the arena's tensors have no memory yet; the result is checked.
            buffer = unsafe {
                sys::ggml_backend_alloc_ctx_tensors_from_buft(
                    arena.context(),
                    sys::ggml_backend_cpu_buffer_type(),
                )
            };
            if buffer.is_null() {
                let bytes: usize =
                    shapes.iter().map(|(_, s)| s.iter().product::<usize>() * 4).sum();
                return Err(Error::engine(
                    format!("allocating {} MiB", bytes >> 20),
                    "out of memory",
                    "lower --rank or --micro-batch-tokens",
                ));
            }
            // SAFETY: a live buffer.
            unsafe { sys::ggml_backend_buffer_clear(buffer, 0) };
        }
        Ok(TensorSet { tensors, memory: Arc::new(Memory { buffer, arena }) })
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.tensors.is_empty()
    }

    /// Tensor `index`, in the order given at creation.
    pub fn get(&self, index: usize) -> Tensor<'_> {
        self.memory.arena.wrap(self.tensors[index].as_ptr())
    }

    /// All values of tensor `index`.
    pub fn values(&self, index: usize) -> &[f32] {
        let tensor = self.get(index);
        // SAFETY: contiguous F32 in host memory that this set owns; shared while borrowed.
        unsafe { std::slice::from_raw_parts(tensor.data().cast(), tensor.len()) }
    }

    /// All values of tensor `index`, to change.
    pub fn values_mut(&mut self, index: usize) -> &mut [f32] {
        let tensor = self.get(index);
        // SAFETY: contiguous F32 in host memory that this set owns, borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(tensor.data().cast(), tensor.len()) }
    }

    /// Sets everything to zero.
    pub fn clear(&mut self) {
        if !self.memory.buffer.is_null() {
            // SAFETY: a live buffer.
            unsafe { sys::ggml_backend_buffer_clear(self.memory.buffer, 0) }
        }
    }

    /// Holds headers and data alive for whoever keeps pointers to them (`llama::LiveAdapter`).
    pub(crate) fn keep_alive(&self) -> Arc<dyn std::any::Any + Send + Sync> {
        self.memory.clone()
    }

    /// Bytes of all tensors, padding included.
    pub fn n_bytes(&self) -> usize {
        if self.memory.buffer.is_null() {
            return 0;
        }
        // SAFETY: a live buffer.
        unsafe { sys::ggml_backend_buffer_get_size(self.memory.buffer) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if !self.buffer.is_null() {
            // SAFETY: made in `zeros`, freed once.
            unsafe { sys::ggml_backend_buffer_free(self.buffer) }
        }
    }
}
