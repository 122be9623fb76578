// The machine: runs the blocks of a grid, one fiber per thread, and lets threads synchronise where CUDA lets them.
//
// A thread runs until it has to wait: at a barrier, in a warp operation, for a message. Then the scheduler chooses
// which thread continues, in one of four orders (see pick). Messages between blocks take a while and arrive when the
// scheduler says so. A cluster runs to completion before the next one starts.

#define SIMT_MACHINE
#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#ifdef __SSE__
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>

#include "check.h"

#ifdef SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
inline void __asan_unpoison_memory_region(const void*, size_t) {}
#endif

namespace simt {
namespace {

// -------------------------------------------------------------------------------------------------------------- fibers
// A fiber runs one thread after another, for ever. It is entered through ucontext once; later switches are jumps, in
// functions that are opaque to the optimiser (noipa): it must assume that anything may have happened meanwhile.

const size_t STACK = 256 << 10;

struct Fiber {
    char* stack;
    size_t bytes;  // used bytes: stacks start at different offsets in a page, to spread over cache sets
    bool begun = false;
    void* at[5];  // __builtin_setjmp
    void* shadow = nullptr;
    ucontext_t start;
};

void* home_at[5];
void* home_shadow;
const void* home_stack;
size_t home_bytes;
Fiber* running;

void body();

void begin() {
    __sanitizer_finish_switch_fiber(nullptr, &home_stack, &home_bytes);
    body();
}
[[gnu::noipa]] void leap(void** to) { __builtin_longjmp(to, 1); }
[[gnu::noipa]] void leave_home(Fiber* f) {
    if (__builtin_setjmp(home_at)) return;
    if (f->begun) leap(f->at);
    f->begun = true;
    getcontext(&f->start);
    f->start.uc_stack = {f->stack, 0, f->bytes};
    f->start.uc_link = nullptr;
    makecontext(&f->start, begin, 0);
    setcontext(&f->start);
}
[[gnu::noipa]] void leave(Fiber* f) {
    if (__builtin_setjmp(f->at) == 0) leap(home_at);
}
void flush_subnormals(bool on) {  // operands and results, of floats and of doubles
#ifdef __SSE__
    const unsigned both = _MM_FLUSH_ZERO_ON | 0x40;
    _mm_setcsr(on ? _mm_getcsr() | both : _mm_getcsr() & ~both);
#endif
}
void enter(Fiber* f) {  // from the scheduler
    running = f;
    __sanitizer_start_switch_fiber(&home_shadow, f->stack, STACK);
    leave_home(f);
    __sanitizer_finish_switch_fiber(home_shadow, nullptr, nullptr);
    running = nullptr;
}
void go_home() {  // to the scheduler
    Fiber* f = running;
    __sanitizer_start_switch_fiber(&f->shadow, home_stack, home_bytes);
    leave(f);
    __sanitizer_finish_switch_fiber(f->shadow, nullptr, nullptr);
}
Fiber* new_fiber(size_t number) {
    char* memory = static_cast<char*>(
        mmap(nullptr, STACK + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stack of a thread");
    mprotect(memory, 4096, PROT_NONE);  // a guard page for stack overflow
    Fiber* f = new Fiber;
    f->stack = memory + 4096;
    f->bytes = STACK - number % 64 * 64;
    return f;
}

// A wild pointer ends the launch and not the process.
alignas(16) char signal_stack[64 << 10];
stack_t stack_before_us;
struct sigaction before_us[2];
void wild(int number, siginfo_t* info, void* context) {
    if (!running) {  // not ours
        sigaction(number, &before_us[number == SIGBUS], nullptr);
        return;
    }
    const void* pc = nullptr;
#ifdef __x86_64__
    pc = reinterpret_cast<char*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]) + 1;
#endif
    (void)context;
    fail("bounds", pc, "touches address %p, where nothing is, or overflows its stack", info->si_addr);
}
void guard(bool on) {
    stack_t stack{signal_stack, 0, sizeof signal_stack};
    struct sigaction ours{};
    ours.sa_sigaction = wild;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    on ? sigaltstack(&stack, &stack_before_us) : sigaltstack(&stack_before_us, nullptr);
    for (int i = 0; i < 2; ++i) {
        const int number = i ? SIGBUS : SIGSEGV;
        on ? sigaction(number, &ours, &before_us[i]) : sigaction(number, &before_us[i], nullptr);
    }
}

// ---------------------------------------------------------------------------------------------- threads, warps, blocks

struct Warp;
struct Block;

struct Thread {
    Fiber* fiber;
    Block* block;
    Warp* warp;
    int lane;
    Place place;
    check::Knowledge known;
    const char* waits = nullptr;  // what for, and where
    int line = 0;
    u64 value = 0;  // input of a warp operation, then its result
    int by = 0;
    bool arrived = false;    // at the cluster barrier, without having waited
    int cluster_phases = 0;  // cluster barriers passed
};

struct Warp {
    Thread* lanes[32];
    std::vector<Thread*> ready;
    u32 priority;
    int arrived = 0, done = 0, line = 0;
    Collective what = SHFL;
    check::Meeting meeting;
};

struct Barrier {  // a transaction barrier, in shared memory
    u32 count, pending, phase = 0, id;
    const Thread* by;  // the thread that initialised it, after how many barriers of block and cluster
    int syncs, cluster_phases;
    bool fenced = false;
    i64 bytes = 0;
    std::vector<Thread*> waiting;
    check::Meeting meeting;
    check::Clock done;
};

struct Array {
    void* base;
    i64 bytes;
};

struct Block {
    int rank;
    Place place;
    std::vector<Thread> threads;
    std::deque<Warp> warps;
    std::map<const void*, Array> arrays;  // by the place of their declaration
    std::map<u64*, Barrier> barriers;
    int arrived = 0, done = 0, line = 0, syncs = 0;  // at sync_block
    bool vote = false, outcome = false;
    check::Meeting meeting;
    ~Block() {
        for (auto& [key, a] : arrays) free(a.base);
    }
};

struct Message {  // to one address, with a barrier that counts it
    Block* to;
    void* at;
    uint4 value;
    Barrier* barrier;
    int line;
    check::Clock known;
};

struct Launch {
    void (*call)(void**);
    void** args;
    u32 grid[3], block, cluster, order, flush;
    u64 seed;
    const Region* regions;
    i64 n_regions;
};
enum Order { FIFO, LIFO, RANDOM, PRIORITY };

// All of one launch. One launch at a time.
const Launch* launch;
std::mt19937_64 random_bits;
std::vector<Fiber*> fibers;
std::deque<Block> cluster;  // the blocks that run
std::vector<Warp*> awake;   // with threads that can go on
std::vector<Message> messages;
std::vector<Thread*> cluster_waiting;
int cluster_arrived, cluster_phase;
u32 barriers_made;
check::Meeting cluster_meeting;
check::Clock cluster_known;
Thread* self;
std::string failure;
struct Failed {};

u64 below(u64 n) { return random_bits() % n; }

void wake(Thread* t) {
    t->waits = nullptr;
    if (t->warp->ready.empty()) awake.push_back(t->warp);
    t->warp->ready.push_back(t);
}
void pause() {  // until the scheduler resumes this thread
    Thread* me = self;
    go_home();
    self = me;
}
void wait(const char* what, int line) {
    self->waits = what;
    self->line = line;
    pause();
}
void yield() {
    wake(self);
    pause();
}

template <class T>
T take(std::vector<T>& from, size_t i) {
    T found = std::move(from[i]);
    from.erase(from.begin() + static_cast<std::ptrdiff_t>(i));
    return found;
}

// Which thread continues. FIFO: the warp that has waited longest, its lanes in order. LIFO: the last to become
// runnable. RANDOM: any. PRIORITY: the warp with the highest priority, which is random and redrawn now and then.
Thread* pick() {
    if (awake.empty()) return nullptr;
    size_t w = 0;
    if (launch->order == LIFO) w = awake.size() - 1;
    if (launch->order == RANDOM) w = below(awake.size());
    if (launch->order == PRIORITY) {
        if (below(64) == 0) awake[below(awake.size())]->priority = static_cast<u32>(random_bits());
        for (size_t i = 1; i < awake.size(); ++i)
            if (awake[i]->priority > awake[w]->priority) w = i;
    }
    std::vector<Thread*>& ready = awake[w]->ready;
    const size_t lane = launch->order == FIFO ? 0 : launch->order == LIFO ? ready.size() - 1 : below(ready.size());
    Thread* t = take(ready, lane);
    if (ready.empty()) take(awake, w);
    return t;
}

void complete(Barrier& b) {  // completes a phase, if nothing is missing
    if (b.pending != 0 || b.bytes != 0) return;
    b.pending = b.count;
    ++b.phase;
    b.done = b.meeting.close(b.id, b.phase);
    for (Thread* t : b.waiting) wake(t);
    b.waiting.clear();
}

void deliver(size_t i) {
    const Message m = take(messages, i);
    if (m.to->done == static_cast<int>(m.to->threads.size()))
        fail("cluster", m.line, "this message came to block %d of the cluster after that had ended", m.to->rank);
    check::message(m.at, sizeof m.value, m.known, m.barrier->id, m.barrier->phase + 1, m.line);
    m.barrier->meeting.add(m.known);
    memcpy(m.at, &m.value, sizeof m.value);
    m.barrier->bytes -= static_cast<i64>(sizeof m.value);
    complete(*m.barrier);
}

bool deliver_now() {
    if (messages.empty()) return false;
    if (awake.empty() || launch->order == FIFO) return true;
    return launch->order != LIFO && below(launch->order == RANDOM ? 16 : 64) == 0;
}

std::string name(const Thread& t) {
    char text[96];
    snprintf(text, sizeof text, "thread %u of block (%u, %u, %u)", t.place.thread.x, t.place.block.x, t.place.block.y,
             t.place.block.z);
    return text;
}

[[gnu::noipa]] void soil_stack() {  // an unwritten local variable in memory reads as NaN
    char below[8192];
    memset(below, 0xff, sizeof below);
    asm volatile("" ::"r"(below) : "memory");
}

void body() {
    for (;;) {
        soil_stack();
        launch->call(launch->args);
        Thread& t = *self;
        Block& b = *t.block;
        ++b.done;
        ++t.warp->done;
        t.waits = "(ended)";
        if (b.arrived) fail("barrier", b.line, "returned, and others wait for it at sync_block");
        if (t.warp->arrived)
            fail("divergence", t.warp->line, "returned, and its warp waits for it in a warp operation");
        if (t.arrived) fail("cluster", 0, "returned between cluster_arrive and cluster_wait");
        go_home();  // and comes back as another thread
    }
}

void deadlock() {
    std::string text;
    std::map<std::pair<std::string, int>, std::pair<int, Thread*>> groups;
    for (Block& b : cluster)
        for (Thread& t : b.threads)
            if (strcmp(t.waits, "(ended)")) {
                auto& g = groups[{t.waits, t.line}];
                if (g.first++ == 0) g.second = &t;
            }
    for (auto& [where, who] : groups)
        text += "\n    " + std::to_string(who.first) + " threads (first " + name(*who.second) + ") in " + where.first +
                ", line " + std::to_string(where.second);
    fail("deadlock", groups.empty() ? 0 : groups.begin()->first.second, "nobody can go on:%s", text.c_str());
}

void make_block(u64 number, int rank) {
    cluster.emplace_back();
    Block& b = cluster.back();
    const u32* g = launch->grid;
    b.rank = rank;
    b.place = {{0, 0, 0},
               {u32(number % g[0]), u32(number / g[0] % g[1]), u32(number / g[0] / g[1])},
               {launch->block, 1, 1},
               {g[0], g[1], g[2]}};
    b.threads.resize(launch->block);
    for (u32 i = 0; i < launch->block; ++i) {
        Thread& t = b.threads[i];
        if (i % 32 == 0) b.warps.emplace_back().priority = static_cast<u32>(random_bits());
        const size_t id = static_cast<size_t>(rank) * launch->block + i;
        while (fibers.size() <= id) fibers.push_back(new_fiber(fibers.size()));
        t.fiber = fibers[id];
        t.block = &b;
        t.warp = &b.warps.back();
        t.lane = static_cast<int>(i % 32);
        t.warp->lanes[t.lane] = &t;
        t.place = b.place;
        t.place.thread.x = i;
        t.known.id = static_cast<u32>(id);
    }
}

void run_cluster(u64 number) {
    check::cluster_begins(launch->block, launch->cluster);
    cluster_arrived = cluster_phase = 0;
    barriers_made = 0;
    cluster_meeting = {};
    for (u32 r = 0; r < launch->cluster; ++r) make_block(number * launch->cluster + r, static_cast<int>(r));
    for (Block& b : cluster)
        for (Thread& t : b.threads) wake(&t);
    for (;;) {
        if (deliver_now()) {
            const bool any = launch->order == RANDOM || launch->order == PRIORITY;
            deliver(any ? below(messages.size()) : launch->order == LIFO ? messages.size() - 1 : 0);
            continue;
        }
        Thread* t = pick();
        if (!t) break;
        self = t;
        check::runs(&t->known, t->fiber->stack, STACK);
        if (launch->flush) flush_subnormals(true);
        enter(t->fiber);
        if (launch->flush) flush_subnormals(false);
        self = nullptr;
        check::runs(nullptr, nullptr, 0);
        if (!failure.empty()) throw Failed();
    }
    for (Block& b : cluster)
        if (b.done != static_cast<int>(launch->block)) deadlock();
}

void clear() {
    check::forget();
    messages.clear();
    awake.clear();
    cluster_waiting.clear();
    cluster.clear();
    self = nullptr;
}

Array& array(Block& b, const void* key, i64 bytes, int align) {
    auto found = b.arrays.find(key);
    if (found == b.arrays.end()) {
        i64 total = bytes;
        for (auto& [k, a] : b.arrays) total += a.bytes;
        if (total > 48 << 10) fail("shared", 0, "is in a block with %lld bytes of shared memory", total);
        void* p = nullptr;
        // The exact size, for AddressSanitizer to see the end; unwritten elements read as NaN.
        if (posix_memalign(&p, static_cast<size_t>(std::max(align, 16)), static_cast<size_t>(bytes))) abort();
        memset(p, 0xff, static_cast<size_t>(bytes));
        check::declare(p, static_cast<u64>(bytes), "a shared array of block " + std::to_string(b.rank));
        found = b.arrays.emplace(key, Array{p, bytes}).first;
    }
    return found->second;
}

// The same offset in the shared memory of another block.
char* in_block(const void* p, u64 bytes, int rank, int line) {
    for (auto& [key, a] : self->block->arrays) {
        const i64 offset = static_cast<const char*>(p) - static_cast<char*>(a.base);
        if (0 <= offset && offset + static_cast<i64>(bytes) <= a.bytes) {
            if (rank < 0 || rank >= static_cast<int>(cluster.size()))
                fail("cluster", line, "names block %d of a cluster of %zu", rank, cluster.size());
            return static_cast<char*>(array(cluster[static_cast<size_t>(rank)], key, a.bytes, 128).base) + offset;
        }
    }
    fail("bounds", line, "names %llu bytes that are not within one array of its shared memory", bytes);
}

// A barrier that exists, and whose initialisation is visible to this thread.
Barrier& barrier(Block& b, u64* at, int line) {
    const auto found = b.barriers.find(at);
    if (found == b.barriers.end())
        fail("mbarrier", line, "uses a barrier of block %d that has not been initialised", b.rank);
    const Barrier& bar = found->second;
    const bool synced = self->block == &b && b.syncs > bar.syncs,
               met = bar.fenced && self->cluster_phases > bar.cluster_phases;
    if (bar.by != self && !synced && !met)
        fail("mbarrier", line, "uses a barrier of block %d, and nothing says that it has been initialised", b.rank);
    return found->second;
}

}  // namespace

// ------------------------------------------------------------------------------------------------- called by kernels

void fail(const char* kind, Where where, const char* format, ...) {
    char text[2048];
    va_list more;
    va_start(more, format);
    vsnprintf(text, sizeof text, format, more);
    va_end(more);
    Dl_info module{};
    if (where.pc) dladdr(where.pc, &module);
    const i64 offset = where.pc ? static_cast<const char*>(where.pc) - static_cast<char*>(module.dli_fbase) - 1 : 0;
    failure = std::string(kind) + "|" + std::to_string(where.line) + "|" + std::to_string(offset) + "|" +
              (self ? name(*self) + " " : "") + text;
    if (running) go_home();  // for ever
    throw Failed();
}

Place place() { return self->place; }

void access(const void* p, int bytes, Access kind, int line) {
    if (reinterpret_cast<u64>(p) % static_cast<u64>(bytes))
        fail("misaligned", line, "touches %d bytes at an address that is no multiple of %d", bytes, bytes);
    check::access(p, static_cast<u64>(bytes), kind, line);
}
void prefetch(const void* p, u32 bytes, u32 unit, int line) {
    if (!bytes || bytes % unit || reinterpret_cast<u64>(p) % unit)
        fail("misaligned", line, "prefetches %u bytes at %p, which are no whole %u", bytes, p, unit);
    check::access(p, bytes, PREFETCH, line);
}
void fence() { check::fence(); }
void ticket() { check::ticket(); }
void* shared(const void* key, i64 bytes, int align) { return array(*self->block, key, bytes, align).base; }

u64 collective(Collective what, u64 value, int by, int line) {
    static const char* const names[] = {"shfl", "shfl_xor", "ballot", "sync_warp"};
    Thread& t = *self;
    Warp& w = *t.warp;
    if (w.done) fail("divergence", line, "is in %s, and a lane of its warp has returned", names[what]);
    if (w.arrived && (w.what != what || w.line != line))
        fail("divergence", line, "is in %s, and lanes of its warp are in %s, line %d", names[what], names[w.what],
             w.line);
    w.what = what;
    w.line = line;
    t.value = value;
    t.by = by;
    if (what == SYNC_WARP) w.meeting.add(t.known);
    if (++w.arrived < 32) {
        wait(names[what], line);
        return t.value;
    }
    w.arrived = 0;
    u64 given[32], votes = 0;
    for (int i = 0; i < 32; ++i) given[i] = w.lanes[i]->value, votes |= u64(given[i] != 0) << i;
    const check::Clock known = w.meeting.close();
    for (int i = 0; i < 32; ++i) {
        Thread& lane = *w.lanes[i];
        const int from = what == SHFL ? lane.by & 31 : i ^ lane.by;
        if (what == BALLOT)
            lane.value = votes;
        else if (what == SYNC_WARP)
            check::knows(lane.known, known, true);
        else if (0 <= from && from < 32)
            lane.value = given[from];
        wake(&lane);
    }
    pause();
    return t.value;
}

bool block_barrier(bool yes, int line) {
    Thread& t = *self;
    Block& b = *t.block;
    if (b.done) fail("barrier", line, "is at sync_block, and another thread of its block has returned");
    if (b.arrived && b.line != line)
        fail("barrier", line, "is at sync_block, and others of its block are at that of line %d", b.line);
    b.line = line;
    b.vote |= yes;
    b.meeting.add(t.known);
    if (++b.arrived < static_cast<int>(b.threads.size())) {
        wait("sync_block", line);
        return b.outcome;
    }
    b.arrived = 0;
    ++b.syncs;
    b.outcome = b.vote;
    b.vote = false;
    const check::Clock known = b.meeting.close();
    for (Thread& other : b.threads) {
        check::knows(other.known, known, true);
        wake(&other);
    }
    pause();
    return b.outcome;
}

int cluster_rank() { return self->block->rank; }

void cluster_arrive(int line) {
    Thread& t = *self;
    if (t.arrived) fail("cluster", line, "arrives twice without cluster_wait");
    for (Block& b : cluster)
        if (b.done) fail("cluster", line, "is at the cluster barrier, and a thread of block %d has returned", b.rank);
    t.arrived = true;
    cluster_meeting.add(t.known);
    if (++cluster_arrived < static_cast<int>(cluster.size() * launch->block)) return;
    cluster_arrived = 0;
    ++cluster_phase;
    cluster_known = cluster_meeting.close();
    for (Thread* other : cluster_waiting) wake(other);
    cluster_waiting.clear();
}

void cluster_wait(int line) {
    Thread& t = *self;
    if (!t.arrived) fail("cluster", line, "waits without cluster_arrive");
    while (cluster_phase == t.cluster_phases) {
        cluster_waiting.push_back(&t);
        wait("cluster_wait", line);
    }
    t.arrived = false;
    ++t.cluster_phases;
    check::knows(t.known, cluster_known, false);
    yield();
}

void mbarrier_init(u64* at, u32 count, int line) {
    Thread& t = *self;
    in_block(at, 8, t.block->rank, line);
    if (t.block->barriers.count(at)) fail("mbarrier", line, "initialises a barrier again");
    Barrier& b = t.block->barriers[at];
    b.count = b.pending = count;
    b.by = &t;
    b.syncs = t.block->syncs;
    b.cluster_phases = t.cluster_phases;
    b.id = static_cast<u32>(cluster.size()) * launch->block + barriers_made++;
}

void mbarrier_fence() {
    for (auto& [at, b] : self->block->barriers) b.fenced |= b.by == self;
}

void mbarrier_expect(u64* at, u32 bytes, int line) {
    Thread& t = *self;
    Barrier& b = barrier(*t.block, at, line);
    if (b.pending == 0) fail("mbarrier", line, "arrives more often than the barrier counts");
    b.meeting.add(t.known);
    --b.pending;
    b.bytes += bytes;
    complete(b);
}

void mbarrier_wait(u64* at, u32 parity, int line) {
    Thread& t = *self;
    Barrier& b = barrier(*t.block, at, line);
    while ((b.phase & 1) == parity) {
        b.waiting.push_back(&t);
        wait("mbar_wait", line);
    }
    check::knows(t.known, b.done, false);
}

void store_async(void* to, int rank, uint4 value, u64* at, int line) {
    Thread& t = *self;
    if (t.cluster_phases == 0)
        fail("cluster", line, "writes to another block before a cluster barrier: has that block started?");
    if (reinterpret_cast<u64>(to) % sizeof value)
        fail("misaligned", line, "sends 16 bytes to an address that is no multiple of that");
    char* there = in_block(to, sizeof value, rank, line);
    u64* bar = reinterpret_cast<u64*>(in_block(at, 8, rank, line));
    Block& target = cluster[static_cast<size_t>(rank)];
    check::Meeting known;
    known.add(t.known);
    messages.push_back({&target, there, value, &barrier(target, bar, line), line, known.close()});
}

namespace {
// UBSan's reports, without its library. The data of each begin with the source location.
struct Source {
    const char* file;
    u32 line, column;
};
[[gnu::noinline]] void undefined(const char* what, const Source* at) {
    if (self) fail("ubsan", static_cast<int>(at->line), "does what C++ does not define: %s", what);
}
}  // namespace
}  // namespace simt

// clang-format off
#define UBSAN(what) extern "C" void __ubsan_handle_##what(const simt::Source* at) { simt::undefined(#what, at); }
UBSAN(add_overflow) UBSAN(sub_overflow) UBSAN(mul_overflow) UBSAN(negate_overflow) UBSAN(divrem_overflow)
UBSAN(shift_out_of_bounds) UBSAN(out_of_bounds) UBSAN(type_mismatch_v1) UBSAN(load_invalid_value) UBSAN(missing_return)
UBSAN(builtin_unreachable) UBSAN(vla_bound_not_positive) UBSAN(pointer_overflow) UBSAN(nonnull_arg)
UBSAN(invalid_builtin) UBSAN(float_cast_overflow)
#undef UBSAN
// clang-format on

#ifdef SIMT_ASAN
static void asan_report(const char* text) {
    if (simt::failure.empty()) simt::failure = std::string("asan|0|0|") + text;
}
#endif

// 0, or -1 with "kind|line|offset of the instruction in its module|text" in `message`.
extern "C" int simt_launch(const simt::Launch* what, char* message, u64 size) {
    using namespace simt;
    static std::mutex one;
    const std::lock_guard<std::mutex> lock(one);
    launch = what;
    random_bits.seed(what->seed);
    failure.clear();
#ifdef SIMT_ASAN
    __asan_set_error_report_callback(asan_report);
#endif
    const u64 clusters = u64(what->grid[0]) * what->grid[1] * what->grid[2] / what->cluster;
    std::vector<u64> order(clusters);
    for (u64 i = 0; i < clusters; ++i) order[i] = what->order == LIFO ? clusters - 1 - i : i;
    if (what->order == RANDOM || what->order == PRIORITY) std::shuffle(order.begin(), order.end(), random_bits);
    check::launch_begins(what->regions, static_cast<int>(what->n_regions));
    guard(true);
    try {
        for (u64 number : order) {
            run_cluster(number);
            clear();
        }
    } catch (const Failed&) {
        clear();
        running = nullptr;
        for (Fiber* f : fibers) {  // abandoned where they are
            f->begun = false;
            __asan_unpoison_memory_region(f->stack, STACK);
        }
        check::runs(nullptr, nullptr, 0);
    } catch (const std::exception& error) { failure = std::string("machine|0|0|") + error.what(); }
    guard(false);
    if (failure.empty()) return 0;
    snprintf(message, size, "%s", failure.c_str());
    return -1;
}
