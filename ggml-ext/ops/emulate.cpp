// Contract: emulate.h. Fibres are entered once by makecontext; from then on _setjmp and _longjmp switch
// between them, which, unlike swapcontext, make no system call.

// Its check takes a jump between fibres for a smashed stack.
#undef _FORTIFY_SOURCE
#include "emulate.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <ucontext.h>
#include <vector>

namespace bupo::emulated {

thread_local Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t STACK_BYTES = 64 * 1024;
constexpr unsigned WARP = 32;

enum class State { RUNS, AT_BARRIER, AT_SHUFFLE, DONE };

struct Fibre {
    std::unique_ptr<char[]> stack = std::make_unique<char[]>(STACK_BYTES);
    ucontext_t start = {};
    jmp_buf    at = {};
    bool       entered = false;
    State      state = State::RUNS;
    uint64_t   slot = 0;
};

struct Block {
    std::vector<std::unique_ptr<Fibre>> fibres;
    const std::function<void()> *       body = nullptr;
    Fibre *                             current = nullptr;
    jmp_buf                             scheduler = {};
    ucontext_t                          entrance = {};
};

thread_local Block block;

[[noreturn]] void stop(const char * why) {
    std::fprintf(stderr, "emulated kernel: %s\n", why);
    std::abort();
}

void enter() {
    (*block.body)();
    block.current->state = State::DONE;
    _longjmp(block.scheduler, 1);
}

void wait(State state) {
    Fibre * self = block.current;
    self->state = state;
    if (_setjmp(self->at) == 0) {
        _longjmp(block.scheduler, 1);
    }
}

void resume(Fibre & fibre, unsigned thread) {
    block.current = &fibre;
    threadIdx = { thread, 0, 0 };
    if (_setjmp(block.scheduler) == 0) {
        if (fibre.entered) {
            _longjmp(fibre.at, 1);
        }
        fibre.entered = true;
        getcontext(&fibre.start);
        fibre.start.uc_stack.ss_sp   = fibre.stack.get();
        fibre.start.uc_stack.ss_size = STACK_BYTES;
        fibre.start.uc_link          = nullptr;
        makecontext(&fibre.start, enter, 0);
        swapcontext(&block.entrance, &fibre.start);
    }
}

// Fibres [first, last) that all wait at `state` run on. True if they did.
bool release(unsigned first, unsigned last, State state) {
    for (unsigned i = first; i < last; ++i) {
        if (block.fibres[i]->state != state) {
            return false;
        }
    }
    for (unsigned i = first; i < last; ++i) {
        block.fibres[i]->state = State::RUNS;
    }
    return true;
}

void run_block(unsigned threads, bool backwards) {
    for (unsigned i = 0; i < threads; ++i) {
        block.fibres[i]->entered = false;
        block.fibres[i]->state   = State::RUNS;
    }
    for (;; backwards = !backwards) {
        for (unsigned i = 0; i < threads; ++i) {
            const unsigned thread = backwards ? threads - 1 - i : i;
            if (block.fibres[thread]->state == State::RUNS) {
                resume(*block.fibres[thread], thread);
            }
        }
        bool released = release(0, threads, State::AT_BARRIER);
        for (unsigned warp = 0; warp < threads; warp += WARP) {
            released |= release(warp, warp + WARP, State::AT_SHUFFLE);
        }
        if (!released) {
            break;
        }
    }
    if (!release(0, threads, State::DONE)) {
        stop("threads of a block wait at different barriers");
    }
}

} // namespace

void __syncthreads() {
    wait(State::AT_BARRIER);
}

uint64_t shuffle_bits(uint64_t bits, unsigned lane_mask) {
    const unsigned thread = threadIdx.x;
    block.fibres[thread]->slot = bits;
    wait(State::AT_SHUFFLE);
    const uint64_t other = block.fibres[thread ^ lane_mask]->slot;
    wait(State::AT_SHUFFLE);
    return other;
}

void run_blocks(Index grid, unsigned threads, const std::function<void()> & body) {
    if (threads == 0 || threads % WARP != 0 || threads > 1024) {
        stop("a block is of whole warps, 1024 threads at most");
    }
    while (block.fibres.size() < threads) {
        block.fibres.push_back(std::make_unique<Fibre>());
    }
    bool backwards = false;
    block.body = &body;
    gridDim    = grid;
    blockDim   = { threads, 1, 1 };
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = { x, y, z };
                run_block(threads, backwards);
                backwards = !backwards;
            }
        }
    }
}

} // namespace bupo::emulated
