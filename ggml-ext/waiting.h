// How ggml's threads wait for one another, on Linux and x86. Included before each C file of llama.cpp (vendor/ggml-sys/build/).
//
// A graph's threads meet at a barrier after each node, where ggml spins with `_mm_pause`. On an idle machine nothing is
// quicker. Where another process has a core, the thread that shares it stands still for milliseconds at a time, and whoever
// spins meanwhile burns the time that the scheduler would give back to it later: two threads become slower than one. So
// here a wait that lasts, in a process that was put aside lately, sleeps in short pieces, and its threads ask for short
// slices (Linux 6.12 and later), so that they are back at once when their turn comes and stand still together, not in turn.

#pragma once

#if defined(__linux__) && defined(__x86_64__)

#include <immintrin.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum {
    BUPO_SAME_WAIT_NS = 5000,              // a longer gap between two pauses begins another wait
    BUPO_SPIN_NS      = 100 * 1000,        // before the first sleep: longer than threads wait where nobody is in the way
    BUPO_SLEEP_NS     = 20 * 1000,
    BUPO_SLICE_NS     = 100 * 1000,        // the shortest that Linux gives
    BUPO_ASK_EVERY_NS = 1000 * 1000,       // whether this process was put aside
    BUPO_BUSY_NS      = 100 * 1000 * 1000, // for so long afterwards the machine counts as busy
};

static inline int64_t bupo_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t) t.tv_sec * 1000000000 + t.tv_nsec;
}

// Whether one of this process's threads was put aside for somebody else within the last BUPO_BUSY_NS.
static inline bool bupo_machine_is_busy(int64_t now) {
    static _Atomic int64_t asked, busy_until;
    static _Atomic long    put_aside;
    int64_t before = atomic_load_explicit(&asked, memory_order_relaxed);
    if (now - before > BUPO_ASK_EVERY_NS && atomic_compare_exchange_strong(&asked, &before, now)) {
        struct rusage usage;
        getrusage(RUSAGE_SELF, &usage);
        if (atomic_exchange(&put_aside, usage.ru_nivcsw) != usage.ru_nivcsw && before != 0) {
            atomic_store_explicit(&busy_until, now + BUPO_BUSY_NS, memory_order_relaxed);
        }
    }
    return now < atomic_load_explicit(&busy_until, memory_order_relaxed);
}

// The calling thread's share of a core stays what it is; it comes in smaller pieces.
static inline void bupo_short_slices(void) {
    // struct sched_attr, version 0: C libraries before glibc 2.41 do not have it.
    struct {
        uint32_t size, policy;
        uint64_t flags;
        int32_t  nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
    } attr = { .size = sizeof attr };
    if (syscall(SYS_sched_getattr, 0, &attr, sizeof attr, 0) == 0 && attr.policy == 0) {
        attr.runtime = BUPO_SLICE_NS;
        syscall(SYS_sched_setattr, 0, &attr, 0); // where it is refused, slices stay as they are
    }
}

static inline void bupo_wait_a_little(void) {
    static __thread struct {
        int64_t began, looked;
        bool    short_slices;
    } wait;
    _mm_pause();
    int64_t now = bupo_now_ns();
    if (now - wait.looked > BUPO_SAME_WAIT_NS) {
        wait.began = now;
    }
    wait.looked = now;
    if (now - wait.began < BUPO_SPIN_NS || !bupo_machine_is_busy(now)) {
        return;
    }
    if (!wait.short_slices) {
        bupo_short_slices();
        wait.short_slices = true;
    }
    struct timespec nap = { .tv_sec = 0, .tv_nsec = BUPO_SLEEP_NS };
    nanosleep(&nap, NULL);
    wait.looked = bupo_now_ns();
}

#define _mm_pause bupo_wait_a_little

#endif
