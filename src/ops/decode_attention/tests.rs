use super::*;

/// Sequences with keys in common and of their own, in one layer of a cache.
struct Layer {
    size: usize,
    heads: usize,
    shared: usize,
    keys: usize,
    /// Keys that each sequence has.
    lengths: Vec<usize>,
    q: Vec<f32>,
    k: Vec<u16>,
    v: Vec<u16>,
    mask: Vec<u16>,
    lineages: Vec<sys::bupo_lineage>,
}

impl Layer {
    fn new(
        [size, heads, shared]: [usize; 3],
        streams: usize,
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
        let q = (0..streams * heads * size).map(|_| random() as f32 / (1 << 23) as f32 - 1.0);
        let q = q.collect();
        let lengths: Vec<usize> = (0..streams).map(|s| common + 1 + s % own).collect();
        let allows = |len: usize, key: usize| key < len && key + window >= len;
        let row = |&len: &usize| (0..keys).map(move |key| !allows(len, key) as u16 * 0xfc00);
        let mask = lengths.iter().flat_map(row).collect();
        let lineages = vec![sys::bupo_lineage { origin: 3, rows: common as u32 }; streams];
        Layer { size, heads, shared, keys, lengths, q, k, v, mask, lineages }
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
        let (streams, width) = (self.lengths.len(), self.shared * self.size);
        let cache = |data: &[u16]| {
            let ne = [self.size, self.keys, self.shared, streams];
            let nb = [2, 2 * width, 2 * self.size, 2 * width * self.keys];
            tensor(ne, nb, data.as_ptr().cast())
        };
        let ne = [self.size, 1, self.heads, streams];
        let nb = [4, 4, 4 * self.size, 4 * self.size * self.heads];
        let mut q = tensor(ne, nb, self.q.as_ptr().cast());
        let (mut k, mut v) = (cache(&self.k), cache(&self.v));
        let rows = [2, 2 * self.keys, 2 * self.keys, 2 * self.keys];
        let mut mask = tensor([self.keys, 1, 1, streams], rows, self.mask.as_ptr().cast());
        let mut y = vec![f32::NAN; self.q.len()];
        let mut dst = tensor([self.size, self.heads, 1, streams], nb, y.as_mut_ptr().cast());
        dst.op_params[0] = self.scale().to_bits() as i32;
        dst.src[..4].copy_from_slice(&[&mut q, &mut k, &mut v, &mut mask].map(|t| t as *mut _));
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
            let (stream, head) = (i / self.heads, i % self.heads * self.shared / self.heads);
            let sees = |&key: &usize| self.mask[stream * self.keys + key] == 0;
            let seen: Vec<usize> = (0..self.keys).filter(sees).collect();
            let e = seen.iter().map(|&key| {
                let k = self.row(&self.k, stream, head, key);
                let score: f64 = q.iter().zip(k).map(|(q, k)| *q as f64 * k as f64).sum();
                (score * self.scale() as f64).exp()
            });
            let e: Vec<f64> = e.collect();
            let mut sums = vec![0.0; self.size];
            for (&key, e) in seen.iter().zip(&e) {
                let v = self.row(&self.v, stream, head, key);
                sums.iter_mut().zip(v).for_each(|(sum, v)| *sum += e * v as f64);
            }
            y.extend(sums.into_iter().map(|sum| sum / e.iter().sum::<f64>()));
        }
        y
    }
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
        let layer = Layer::new(sizes, streams, keys, window);
        let wanted = layer.wanted();
        for (together, invariant) in [(false, false), (true, false), (true, true)] {
            let y = layer.run(together, invariant, 1);
            let error = y.iter().zip(&wanted).map(|(y, want)| (*y as f64 - want).abs());
            let worst = error.fold(0.0, f64::max);
            assert!(worst < 2e-6, "{sizes:?} {together} {invariant}: {worst:e}");
            assert!(y == layer.run(together, invariant, 3), "{sizes:?}: threads matter");
        }
        let alone = layer.run(false, true, 1);
        assert!(layer.run(true, true, 1) == alone, "{sizes:?}: the others matter");
    }
}

#[test]
fn sequences_of_one_origin_are_computed_together() {
    let lineage = |origin, rows| sys::bupo_lineage { origin, rows };
    // Ten of one prompt, one of which forgot most of it; two of another that is shorter than a tile; one of none.
    let mut lineages = vec![lineage(7, 150); 10];
    lineages[3].rows = 70;
    lineages.extend([lineage(2, 50), lineage(2, 50), lineage(0, 0)]);
    let seen = |stream: usize| if stream == 9 { 140 } else { 200 + stream };
    let groups = groups(13, Some(&lineages), seen);
    let members = |streams: Range<usize>| streams.map(|s| (s, seen(s))).collect();
    assert_eq!(groups.len(), 5);
    for (i, stream) in [10, 11, 12].into_iter().enumerate() {
        assert_eq!(groups[i], Group { members: members(stream..stream + 1), common: 0 });
    }
    assert_eq!(groups[3], Group { members: members(0..8), common: 64 });
    assert_eq!(groups[4], Group { members: members(8..10), common: 128 });
    let alone = super::groups(2, None, seen);
    assert!(alone.iter().all(|group| group.members.len() == 1 && group.common == 0));
}
