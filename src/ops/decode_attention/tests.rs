use super::*;

/// Sequences with keys in common and of their own, in one layer of a cache.
struct Layer {
    size: usize,
    heads: usize,
    shared: usize,
    keys: usize,
    streams: usize,
    /// Tokens of each sequence.
    tokens: usize,
    q: Vec<f32>,
    k: Vec<u16>,
    v: Vec<u16>,
    mask: Vec<u16>,
    sinks: Option<Vec<f32>>,
    softcap: f32,
    lineages: Vec<sys::bupo_lineage>,
}

impl Layer {
    fn new(
        [size, heads, shared]: [usize; 3],
        [streams, tokens]: [usize; 2],
        [common, own]: [usize; 2],
        window: usize,
    ) -> Layer {
        let mut state = 7u64;
        let mut random = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            state >> 40
        };
        let keys = common + own;
        // From 0.5 to 2, of either sign.
        let mut half = || (random() as u16 & 0x87ff) + 0x3800;
        let [k, v] = [0; 2].map(|_| {
            let mut all: Vec<u16> = (0..streams * keys * shared * size).map(|_| half()).collect();
            let first = all[..common * shared * size].to_vec();
            for stream in all.chunks_exact_mut(keys * shared * size) {
                stream[..first.len()].copy_from_slice(&first);
            }
            all
        });
        let q =
            (0..streams * tokens * heads * size).map(|_| random() as f32 / (1 << 23) as f32 - 1.0);
        let q = q.collect();
        // Keys that each token sees but for the window: its sequence's and those of earlier tokens.
        let lengths =
            (0..streams).flat_map(|s| (0..tokens).map(move |t| common + 1 + (s + t) % own));
        let allows = |len: usize, key: usize| key < len && key + window >= len;
        let row = |len: usize| (0..keys).map(move |key| !allows(len, key) as u16 * 0xfc00);
        let mask = lengths.flat_map(row).collect();
        let lineages = vec![sys::bupo_lineage { origin: 3, rows: common as u32 }; streams];
        let (sinks, softcap) = (None, 0.0);
        Layer {
            size,
            heads,
            shared,
            keys,
            streams,
            tokens,
            q,
            k,
            v,
            mask,
            sinks,
            softcap,
            lineages,
        }
    }

    fn run(&self, together: bool, invariant: bool, threads: usize) -> Vec<f32> {
        // SAFETY: numbers and pointers; each is set below where it is read.
        let empty: sys::ggml_tensor = unsafe { std::mem::zeroed() };
        let tensor = |ne: [usize; 4], nb: [usize; 4], data: *const u8| sys::ggml_tensor {
            ne: ne.map(|n| n as i64),
            nb,
            data: data.cast_mut().cast(),
            ..empty
        };
        let (streams, tokens, width) = (self.streams, self.tokens, self.shared * self.size);
        let cache = |data: &[u16]| {
            let ne = [self.size, self.keys, self.shared, streams];
            let nb = [2, 2 * width, 2 * self.size, 2 * width * self.keys];
            tensor(ne, nb, data.as_ptr().cast())
        };
        let ne = [self.size, tokens, self.heads, streams];
        let row = 4 * self.size * self.heads;
        let nb = [4, row, 4 * self.size, row * tokens];
        let mut q = tensor(ne, nb, self.q.as_ptr().cast());
        let (mut k, mut v) = (cache(&self.k), cache(&self.v));
        let all = 2 * self.keys * tokens;
        let rows = [2, 2 * self.keys, all, all];
        let mut mask = tensor([self.keys, tokens, 1, streams], rows, self.mask.as_ptr().cast());
        let mut y = vec![f32::NAN; self.q.len()];
        let nb = [4, 4 * self.size, row, row * tokens];
        let ne = [self.size, self.heads, tokens, streams];
        let mut dst = tensor(ne, nb, y.as_mut_ptr().cast());
        dst.op_params[0] = self.scale().to_bits() as i32;
        dst.op_params[2] = self.softcap.to_bits() as i32;
        dst.src[..4].copy_from_slice(&[&mut q, &mut k, &mut v, &mut mask].map(|t| t as *mut _));
        let sinks = self.sinks.as_ref();
        let mut sinks = sinks.map(|z| tensor([z.len(), 1, 1, 1], [4, 0, 0, 0], z.as_ptr().cast()));
        dst.src[4] = sinks.as_mut().map_or(std::ptr::null_mut(), |t| t as *mut _);
        let lineages = if together { self.lineages.as_ptr() } else { std::ptr::null() };
        for ith in 0..threads as c_int {
            // SAFETY: live tensors of these shapes.
            unsafe { decode_attention(&mut dst, lineages, invariant, ith, threads as c_int) };
        }
        y
    }

    fn scale(&self) -> f32 {
        1.0 / (self.size as f32).sqrt()
    }

    /// Row `key` of a sequence's head.
    fn row(&self, of: &[u16], stream: usize, head: usize, key: usize) -> Vec<f32> {
        let at = ((stream * self.keys + key) * self.shared + head) * self.size;
        let mut row = vec![0.0; self.size];
        // SAFETY: so many halves.
        unsafe { Type::F16.dequantize_raw(of[at..][..self.size].as_ptr().cast(), &mut row) };
        row
    }

    /// By the definition, in doubles.
    fn wanted(&self) -> Vec<f64> {
        let mut y = Vec::new();
        for (i, q) in self.q.chunks_exact(self.size).enumerate() {
            let (row, head) = (i / self.heads, i % self.heads * self.shared / self.heads);
            let stream = row / self.tokens;
            let sees = |&key: &usize| self.mask[row * self.keys + key] == 0;
            let seen: Vec<usize> = (0..self.keys).filter(sees).collect();
            let e = seen.iter().map(|&key| {
                let k = self.row(&self.k, stream, head, key);
                let score: f64 = q.iter().zip(k).map(|(q, k)| *q as f64 * k as f64).sum();
                let score = score * self.scale() as f64;
                match self.softcap as f64 {
                    0.0 => score.exp(),
                    c => (c * (score / c).tanh()).exp(),
                }
            });
            let e: Vec<f64> = e.collect();
            let sink = self.sinks.as_ref().map_or(0.0, |z| (z[i % self.heads] as f64).exp());
            let total = sink + e.iter().sum::<f64>();
            let mut sums = vec![0.0; self.size];
            for (&key, e) in seen.iter().zip(&e) {
                let v = self.row(&self.v, stream, head, key);
                sums.iter_mut().zip(v).for_each(|(sum, v)| *sum += e * v as f64);
            }
            y.extend(sums.into_iter().map(|sum| sum / total));
        }
        y
    }
}

/// The largest error, with any number of threads.
fn error(layer: &Layer, wanted: &[f64], together: bool, invariant: bool) -> f64 {
    let y = layer.run(together, invariant, 1);
    for threads in [2, 3] {
        assert!(y == layer.run(together, invariant, threads), "threads matter");
    }
    y.iter().zip(wanted).map(|(y, want)| (*y as f64 - want).abs()).fold(0.0, f64::max)
}

#[test]
fn few_and_many_queries_give_what_the_definition_does() {
    for (sizes, streams, keys, window) in [
        ([8, 4, 2], 3, [0, 40], usize::MAX),
        ([64, 9, 3], 17, [130, 70], usize::MAX),
        ([128, 8, 8], 12, [192, 3], usize::MAX),
        ([80, 16, 2], 4, [64, 5], 50),
        ([40, 32, 1], 2, [70, 200], 90),
    ] {
        let layer = Layer::new(sizes, [streams, 1], keys, window);
        let wanted = layer.wanted();
        for (together, invariant) in [(false, false), (true, false), (true, true)] {
            let worst = error(&layer, &wanted, together, invariant);
            assert!(worst < 2e-6, "{sizes:?} {together} {invariant}: {worst:e}");
        }
        let alone = layer.run(false, true, 1);
        assert!(layer.run(true, true, 1) == alone, "{sizes:?}: the others matter");
    }
}

#[test]
fn prompts_give_what_the_definition_does() {
    // Two tokens, whole groups of them, and a few left over; behind keys that were there before, and within a window.
    for (sizes, shape, keys, window) in [
        ([64, 9, 3], [2, 2], [70, 9], usize::MAX),
        ([128, 16, 8], [1, 70], [0, 71], usize::MAX),
        ([80, 8, 2], [3, 33], [100, 60], usize::MAX),
        ([64, 4, 4], [1, 130], [65, 131], 40),
        ([40, 32, 1], [2, 5], [3, 80], 90),
    ] {
        let layer = Layer::new(sizes, shape, keys, window);
        let worst = error(&layer, &layer.wanted(), false, false);
        assert!(worst < 2e-6, "{sizes:?} {shape:?}: {worst:e}");
    }
}

#[test]
fn a_softcap_and_sinks_are_what_the_definition_says() {
    for (sizes, shape, keys) in [
        ([64, 8, 2], [9, 1], [70, 40]),  // few queries on the same keys
        ([32, 16, 1], [5, 1], [128, 9]), // many
        ([64, 8, 2], [2, 30], [10, 50]), // prompts
    ] {
        let mut layer = Layer::new(sizes, shape, keys, usize::MAX);
        layer.softcap = 1.5;
        let worst = error(&layer, &layer.wanted(), true, false);
        assert!(worst < 2e-6, "softcap {sizes:?} {shape:?}: {worst:e}");
        layer.sinks = Some((0..layer.heads).map(|head| 4.0 - head as f32).collect());
        let worst = error(&layer, &layer.wanted(), true, false);
        assert!(worst < 2e-6, "sinks {sizes:?} {shape:?}: {worst:e}");
    }
}
