//! What the unit itself is told: its permission, its shapes, and 32 x 32 sums.

use std::arch::asm;
use std::arch::x86_64::{_mm512_add_ps, _mm512_loadu_ps, _mm512_storeu_ps};

/// Rows of a tile of A and of sums, columns of a tile of B.
pub(super) const ROWS: usize = 16;
/// Columns of a tile of A, rows of a tile of B (which holds two rows in one of its own, pair by pair).
pub(super) const DEPTH: usize = 32;

/// A tile of A or B in memory: 16 rows of 32 numbers.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Tile(pub [[u16; DEPTH]; ROWS]);

/// Asks the system for the registers that hold tiles, 8 KiB more of each thread's state; it grants them to a whole process.
pub(super) fn permitted() -> bool {
    const ARCH_PRCTL: isize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const TILE_DATA: usize = 18;
    let result: isize;
    // SAFETY: a system call of two numbers, which Linux has had since 5.16; an older one answers with an error.
    unsafe {
        asm!("syscall", inlateout("rax") ARCH_PRCTL => result, in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") TILE_DATA, out("rcx") _, out("r11") _, options(nostack));
    }
    result == 0
}

/// The shapes of this thread's tiles while it lives: all of 16 rows of 64 bytes. Then they are what they were before, for
/// others use the unit, too (a stock llama.cpp beside us), and some set their shapes once per thread.
pub(super) struct Shapes {
    before: Config,
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Shapes {
    /// # Safety
    /// The processor has the unit, and the system has [`permitted`] it.
    pub(super) unsafe fn new() -> Shapes {
        let none =
            Config { palette: 0, start: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        let mut shapes = Shapes { before: none };
        let mut ours = Config { palette: 1, ..none };
        ours.row_bytes[..8].fill(64);
        ours.rows[..8].fill(ROWS as u8);
        // SAFETY: by contract; 64 bytes each, as the processor has them.
        unsafe {
            asm!("sttilecfg [{before}]", "ldtilecfg [{ours}]", before = in(reg) &mut shapes.before,
                ours = in(reg) &ours, options(nostack));
        }
        shapes
    }
}

impl Drop for Shapes {
    fn drop(&mut self) {
        // SAFETY: there are shapes, so there is a unit; what it had before it takes again. A thread without shapes has less to
        // be saved.
        unsafe {
            match self.before.palette {
                0 => asm!("tilerelease", options(nostack, nomem)),
                _ => asm!("ldtilecfg [{}]", in(reg) &self.before, options(nostack, readonly)),
            }
        }
    }
}

/// Two tiles of A side by side times two of B, `depth` of each after another, each as P numbers: 32 x 32 sums, added to C or
/// put there.
#[derive(Clone, Copy)]
pub(super) struct Block {
    /// Tiles of 16 rows: `[depth][P]`.
    pub a: *const Tile,
    /// So many tiles on, those of the next 16 rows.
    pub a_below: usize,
    /// The same of columns, those of the next 16 behind them.
    pub b: *const Tile,
    pub depth: usize,
    pub c: *mut f32,
    /// Floats between rows of C.
    pub c_row: usize,
    pub keep: bool,
}

/// What the unit multiplies: tiles 4 and 5 are A's, 6 and 7 B's, 0 to 3 the sums.
macro_rules! four {
    () => {
        "tdpbf16ps tmm0, tmm4, tmm6
         tdpbf16ps tmm1, tmm4, tmm7
         tdpbf16ps tmm2, tmm5, tmm6
         tdpbf16ps tmm3, tmm5, tmm7"
    };
}

/// The tiles of A that lie `$part` KiB on.
macro_rules! a {
    ($part:literal) => {
        concat!(
            "tileloadd tmm4, [{a0} + {row} + ",
            $part,
            "]
             tileloadd tmm5, [{a1} + {row} + ",
            $part,
            "]"
        )
    };
}

/// The tiles of B.
macro_rules! b {
    ($part:literal) => {
        concat!(
            "tileloadd tmm6, [{b0} + {row} + ",
            $part,
            "]
             tileloadd tmm7, [{b1} + {row} + ",
            $part,
            "]"
        )
    };
}

macro_rules! over_depth {
    ($block:expr, $parts:literal, $($line:expr),+) => {{
        let Block { a, a_below, b, depth, .. } = $block;
        asm!(
            "2:",
            $($line,)+
            concat!("add {a0}, 1024*", $parts), concat!("add {a1}, 1024*", $parts),
            concat!("add {b0}, 1024*", $parts), concat!("add {b1}, 1024*", $parts),
            "dec {depth}", "jnz 2b",
            a0 = inout(reg) a => _, a1 = inout(reg) a.add(a_below) => _,
            b0 = inout(reg) b => _, b1 = inout(reg) b.add(depth * $parts) => _,
            depth = inout(reg) depth => _, row = in(reg) 64usize,
            options(nostack, readonly),
        )
    }};
}

impl Block {
    /// # Safety
    /// A, B and C are valid for their sizes, `depth` is not 0, and this thread has [`Shapes`].
    pub(super) unsafe fn run<const P: usize>(self) {
        // SAFETY: by contract. No code between the blocks of assembly touches tiles: the compiler knows none.
        unsafe {
            match (P, self.keep) {
                (2, _) => {
                    self.begin();
                    // The small ones first.
                    over_depth!(
                        self,
                        2,
                        a!(1024),
                        b!(0),
                        four!(),
                        a!(0),
                        four!(),
                        b!(1024),
                        four!()
                    );
                    self.put();
                }
                (3, false) => {
                    self.sum_up_three();
                    self.put();
                }
                (3, true) => {
                    let mut sums = [[0f32; 2 * ROWS]; 2 * ROWS];
                    self.sum_up_three();
                    Block { c: sums.as_mut_ptr().cast(), c_row: 2 * ROWS, ..self }.put();
                    self.add(&sums);
                }
                _ => unreachable!("{P} parts"),
            }
        }
    }

    /// What is small beside the first product has sums of its own until the last, so that it is not rounded as large ones are.
    unsafe fn sum_up_three(self) {
        // SAFETY: by the caller.
        unsafe {
            Block { keep: false, ..self }.begin();
            over_depth!(
                self,
                3,
                a!(0),
                b!(2048),
                four!(),
                b!(1024),
                four!(),
                a!(1024),
                four!(),
                b!(0),
                four!(),
                a!(2048),
                four!()
            );
            over_depth!(self, 3, a!(0), b!(0), four!());
        }
    }

    unsafe fn begin(self) {
        let (c, row) = (self.c, 4 * self.c_row);
        let below = c.wrapping_add(ROWS * self.c_row);
        // SAFETY: by the caller.
        unsafe {
            match self.keep {
                true => asm!("tileloadd tmm0, [{c} + {row}]", "tileloadd tmm1, [{c} + {row} + 64]",
                    "tileloadd tmm2, [{below} + {row}]", "tileloadd tmm3, [{below} + {row} + 64]",
                    c = in(reg) c, below = in(reg) below, row = in(reg) row, options(nostack, readonly)),
                false => asm!(
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3",
                    options(nostack, nomem)
                ),
            }
        }
    }

    unsafe fn put(self) {
        let (c, row) = (self.c, 4 * self.c_row);
        let below = c.wrapping_add(ROWS * self.c_row);
        // SAFETY: by the caller.
        unsafe {
            asm!("tilestored [{c} + {row}], tmm0", "tilestored [{c} + {row} + 64], tmm1",
                "tilestored [{below} + {row}], tmm2", "tilestored [{below} + {row} + 64], tmm3",
                c = in(reg) c, below = in(reg) below, row = in(reg) row, options(nostack));
        }
    }

    /// Adds sums to C.
    #[target_feature(enable = "avx512f")]
    unsafe fn add(self, sums: &[[f32; 2 * ROWS]; 2 * ROWS]) {
        for (r, sums) in sums.iter().enumerate() {
            for (half, sums) in sums.as_chunks::<ROWS>().0.iter().enumerate() {
                // SAFETY: sixteen floats of a row of C, by the caller.
                unsafe {
                    let at = self.c.add(r * self.c_row + half * ROWS);
                    let sum = _mm512_add_ps(_mm512_loadu_ps(at), _mm512_loadu_ps(sums.as_ptr()));
                    _mm512_storeu_ps(at, sum);
                }
            }
        }
    }
}
