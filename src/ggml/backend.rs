//! Threads, and running a graph on a device.

use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard};

use ggml_sys as sys;

use super::device::{Device, last_error};
use super::neighbours::Neighbours;
use super::tensor::set_up;
use super::{Arena, Tensor, usable_cores};
use crate::{Error, Result};

/// Worker threads that computations share. Idle ones sleep.
pub struct ThreadPool {
    raw: NonNull<sys::ggml_threadpool>,
    n_threads: usize,
    neighbours: Mutex<Neighbours>,
    rounded: bool,
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
        // SAFETY: default parameters for a count within ggml's limit. Nothing is computed without a pool, so
        // our products are known before anything is.
        let raw = unsafe {
            let mut params = sys::ggml_threadpool_params_default(n_threads as i32);
            // By default a worker spins for up to 6.5 million rounds after a graph, on a core that
            // sampling wants: 128 rows of 152k logits on 2 cores took 12 ms so, 7 ms without.
            params.poll = 0;
            sys::bupo_threadpool_new(&mut params)
        };
        let raw = NonNull::new(raw).ok_or_else(|| {
            Error::engine("starting threads", "no thread pool", "try --threads 1")
        })?;
        Ok(ThreadPool { raw, n_threads, neighbours: Mutex::new(Neighbours::new()), rounded: false })
    }

    /// [`ThreadPool::new`] with as many threads as the user asked for, or one per core.
    ///
    /// # Errors
    /// None at all are asked for; the system gives none.
    pub fn with(threads: Option<usize>) -> Result<ThreadPool> {
        if threads == Some(0) {
            let advice = "leave it out for one per core";
            return Err(Error::invalid("threads", "at least 1", "0", advice));
        }
        ThreadPool::new(threads.unwrap_or_else(usable_cores))
    }

    /// Lets products with weights in graphs of ours take rounded numbers, where the processor is quicker with them
    /// (`ops::wants_fast_products`).
    pub fn rounding(mut self, rounded: bool) -> ThreadPool {
        self.rounded = rounded;
        self
    }

    /// Number of threads, the caller's included.
    pub fn n_threads(&self) -> usize {
        self.n_threads
    }

    /// Takes so many running threads of other processes for granted from now on, in place of looking: for tests.
    pub fn assume_neighbours(&self, running: usize) {
        *self.neighbours() = Neighbours::assumed(running, self.n_threads);
    }

    /// Calls `compute` with as many of these threads as have a core at the moment, where other processes run beside this
    /// one; for computations whose results do not depend on it.
    pub(crate) fn with_spare<R>(&self, compute: impl FnOnce(usize) -> R) -> R {
        let result = compute(self.spare_threads());
        if self.n_threads > 1 {
            self.neighbours().look();
        }
        result
    }

    /// Threads that have a core at the moment, the caller's among them.
    pub fn spare_threads(&self) -> usize {
        self.neighbours().spare(self.n_threads)
    }

    fn neighbours(&self) -> MutexGuard<'_, Neighbours> {
        self.neighbours.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub(crate) fn raw(&self) -> *mut sys::ggml_threadpool {
        self.raw.as_ptr()
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        // SAFETY: made by bupo_threadpool_new, freed once, no computation runs on it any more.
        unsafe { sys::bupo_threadpool_free(self.raw.as_ptr()) }
    }
}

/// Runs graphs on a device; owns the memory of their intermediate results, which is kept and reused.
pub struct Executor {
    backend: sys::ggml_backend_t,
    allocator: sys::ggml_gallocr_t,
    // The graph that the memory belongs to at the moment.
    current: *const sys::ggml_cgraph,
    device: Device,
    pool: Arc<ThreadPool>,
}

// SAFETY: all use goes through `&mut self`; nothing in it is bound to a thread.
unsafe impl Send for Executor {}

impl Executor {
    /// An executor on these threads.
    pub fn cpu(pool: Arc<ThreadPool>) -> Result<Executor> {
        // SAFETY: no preconditions; the result is checked.
        let backend = unsafe { sys::bupo_cpu_backend(pool.n_threads() as i32) };
        if backend.is_null() {
            return Err(Error::engine("starting the CPU backend", "out of memory", "free some"));
        }
        // SAFETY: a live CPU backend and a live pool, kept alive by the Arc in `self`.
        let allocator = unsafe {
            sys::bupo_cpu_set_threadpool(backend, pool.raw());
            sys::ggml_gallocr_new(sys::ggml_backend_cpu_buffer_type())
        };
        Ok(Executor { backend, allocator, current: std::ptr::null(), device: Device::Cpu, pool })
    }

    /// An executor on `device`, with these threads for what is done on the CPU.
    ///
    /// # Errors
    /// [`Error::Engine`] with CUDA's words when the GPU is not to be had.
    pub fn new(device: Device, pool: Arc<ThreadPool>) -> Result<Executor> {
        let mut backend = std::ptr::null_mut();
        // SAFETY: a place for the result, which is set on BUPO_OK alone.
        let status = match device {
            Device::Cpu => return Executor::cpu(pool),
            Device::Gpu { index, precise } => unsafe {
                sys::bupo_backend_cuda(index as i32, precise, &mut backend)
            },
            Device::Emulated { precise } => unsafe {
                sys::bupo_backend_emulated(pool.n_threads() as i32, precise, &mut backend)
            },
        };
        if status != sys::BUPO_OK {
            let call = format!("starting {device}");
            return Err(Error::engine(call, last_error(), "use --device cpu"));
        }
        // SAFETY: a live backend.
        let allocator =
            unsafe { sys::ggml_gallocr_new(sys::ggml_backend_get_default_buffer_type(backend)) };
        Ok(Executor { backend, allocator, current: std::ptr::null(), device, pool })
    }

    /// Where graphs run.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Number of threads.
    pub fn n_threads(&self) -> usize {
        self.pool.n_threads()
    }

    /// Bytes that intermediate results take at the moment, and on a device the tiles of our ops.
    pub fn scratch_bytes(&self) -> usize {
        // SAFETY: a live allocator with one buffer; the backend is one of ours unless it is the CPU's.
        unsafe {
            let tiles = match self.device {
                Device::Cpu => 0,
                _ => sys::bupo_backend_scratch_bytes(self.backend),
            };
            sys::ggml_gallocr_get_buffer_size(self.allocator, 0) + tiles
        }
    }

    /// Whether ggml's kernels on the CPU can read a tensor: in host memory, or repacked for them.
    fn reads(&self, tensor: Tensor<'_>) -> bool {
        let buffer = tensor.buffer();
        // SAFETY: a live backend; a buffer pointer in a live header is valid.
        tensor.is_host()
            || (!buffer.is_null()
                && unsafe {
                    let buffer_type = sys::ggml_backend_buffer_get_type(buffer);
                    sys::ggml_backend_supports_buft(self.backend, buffer_type)
                })
    }

    /// What the device can do, to hold an op's time against: products of `n` x `n` matrices, copies of `bytes`; the
    /// best of `reps` times. None on the CPU, which has a yardstick of its own.
    ///
    /// # Errors
    /// [`Error::Engine`] without memory for them.
    pub fn rates(&mut self, n: usize, bytes: usize, reps: usize) -> Result<Option<Rates>> {
        if self.device == Device::Cpu {
            return Ok(None);
        }
        let mut out = sys::bupo_rates { flop_per_s: 0.0, bytes_per_s: 0.0 };
        // SAFETY: a backend of ours, and a place for the result.
        let status = unsafe {
            sys::bupo_backend_rates(self.backend, n as i64, bytes, reps as i32, &mut out)
        };
        if status != sys::BUPO_OK {
            let call = format!("measuring {}", self.device);
            return Err(Error::engine(call, last_error(), "free some of its memory"));
        }
        Ok(Some(Rates { flop_per_s: out.flop_per_s, bytes_per_s: out.bytes_per_s }))
    }

    /// Gives back what [`Executor::scratch_bytes`] counts, for others to use; the next graph takes it anew.
    pub fn release(&mut self) {
        self.current = std::ptr::null();
        // SAFETY: a live allocator, freed once, and a live backend, ours unless it is the CPU's; no graph is at work.
        unsafe {
            sys::ggml_gallocr_free(self.allocator);
            self.allocator =
                sys::ggml_gallocr_new(sys::ggml_backend_get_default_buffer_type(self.backend));
            if self.device != Device::Cpu {
                sys::bupo_backend_release(self.backend);
            }
        }
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
        if self.device == Device::Cpu && !own {
            for i in 0..graph.n_nodes() {
                // SAFETY: a node of a live graph that nobody computes.
                unsafe {
                    let node = sys::ggml_graph_node(graph.raw, i as i32);
                    set_up(node, self.pool.n_threads(), self.pool.rounded)
                }
            }
        }
        if self.device == Device::Cpu
            && let Some(far) = graph.sources().find(|source| !self.reads(*source))
        {
            // The CPU's kernels would read the GPU's addresses.
            let reason = format!("{far:?} lies on a GPU");
            return Err(Error::engine("computing on the CPU", reason, "use --device cpu"));
        }
        for (tensor, input) in inputs {
            match input {
                Input::F32(values) => tensor.write_f32(values),
                Input::I32(values) => tensor.write_i32(values),
                Input::Bytes(bytes) => tensor.write_bytes(bytes),
            }
        }
        // SAFETY: every tensor of the graph has memory now; kernels were given by this crate.
        let compute = || unsafe { sys::ggml_backend_graph_compute(self.backend, graph.raw) };
        let status = match self.device {
            Device::Cpu => self.pool.with_spare(|threads| {
                // SAFETY: a live backend, with as many threads as the pool has, at most.
                unsafe { sys::bupo_cpu_set_threads(self.backend, threads as i32) };
                compute()
            }),
            _ => compute(),
        };
        if status != sys::GGML_STATUS_SUCCESS {
            let reason = match self.device {
                Device::Cpu => format!("status {status}"),
                _ => last_error(),
            };
            return Err(Error::engine(
                format!("computing on {}", self.device),
                reason,
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

/// Rates of a device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rates {
    /// Of matrix products, in the type of weights and activations.
    pub flop_per_s: f64,
    /// Of copies, bytes read plus bytes written.
    pub bytes_per_s: f64,
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
    /// The values of all outputs, in the order in which they were marked.
    pub fn outputs(&self) -> Vec<Vec<f32>> {
        let raw = self.graph.outputs.iter().map(|&raw| raw as *mut sys::ggml_tensor);
        // SAFETY: nodes of the graph's arena, which is borrowed; it has run, so they have memory.
        raw.map(|raw| unsafe { Tensor::from_raw(raw) }.read_f32()).collect()
    }

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

    /// What its nodes read.
    fn sources(&self) -> impl Iterator<Item = Tensor<'g>> {
        (0..self.n_nodes()).flat_map(|i| {
            // SAFETY: a node of a valid graph; sources that are not null are valid headers for 'g.
            unsafe {
                let node = sys::ggml_graph_node(self.raw, i as i32);
                let sources = (*node).src.into_iter().filter(|source| !source.is_null());
                sources.map(|source| Tensor::from_raw(source))
            }
        })
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

    /// Bytes that a perfect implementation would move: what is read from outside, and the outputs.
    pub fn traffic_bytes(&self) -> usize {
        let views =
            [sys::GGML_OP_VIEW, sys::GGML_OP_RESHAPE, sys::GGML_OP_PERMUTE, sys::GGML_OP_TRANSPOSE];
        let mut counted = std::collections::HashSet::new();
        let mut bytes = 0;
        for i in 0..self.n_nodes() {
            // SAFETY: a node of a valid graph; sources that are not null are valid headers, and so is what they view.
            unsafe {
                let node = sys::ggml_graph_node(self.raw, i as i32);
                if views.contains(&(*node).op) {
                    continue;
                }
                for source in (*node).src.into_iter().filter(|source| !source.is_null()) {
                    let whole =
                        if (*source).view_src.is_null() { source } else { (*source).view_src };
                    if (*whole).op == sys::GGML_OP_NONE && counted.insert(source) {
                        bytes += sys::ggml_nbytes(source);
                    }
                }
            }
        }
        // SAFETY: nodes of the graph.
        let written = self
            .outputs
            .iter()
            .map(|&raw| unsafe { sys::ggml_nbytes(raw as *const sys::ggml_tensor) });
        bytes + written.sum::<usize>()
    }

    /// Number of nodes.
    pub fn n_nodes(&self) -> usize {
        // SAFETY: a valid graph.
        unsafe { sys::ggml_graph_n_nodes(self.raw) as usize }
    }
}
