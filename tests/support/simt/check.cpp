// The checker: tests every access of a kernel compiled with g++ -fsanitize=thread for bounds, initialisation, and
// happens-before (see check.h). None of libtsan is linked; the callbacks are at the end.

#define SIMT_MACHINE
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <unordered_map>

#include "check.h"

namespace simt::check {
namespace {

// A stamp: atomic (1 bit), cluster (25), thread (14), time (24). 0: long ago.
typedef u64 Stamp;
const Stamp UNWRITTEN = ~u64(0);
Stamp stamp(u64 cluster, u32 id, u32 time, bool atomic = false) {
    return u64(atomic) << 63 | cluster << 38 | u64(id) << 24 | time;
}
u64 cluster_of(Stamp s) { return s >> 38 & 0x1ffffff; }
u32 id_of(Stamp s) { return s >> 24 & 0x3fff; }
u32 time_of(Stamp s) { return s & 0xffffff; }
bool atomic(Stamp s) { return s >> 63; }

struct Cell {  // of one byte
    Stamp written = 0, read[2] = {0, 0};
};  // the last write, and the last two unordered reads
std::unordered_map<u64, std::unique_ptr<std::array<Cell, 4096>>> pages;

struct Extent {
    const char* base;
    u64 bytes;
    std::string what;
    bool writable;
};
std::vector<Extent>
    extents;  // memory this launch may access: its arguments, then the shared arrays of the running blocks
size_t arguments;

struct Publication {
    size_t ticket;
    Clock clock;
};
std::unordered_map<u64, std::vector<Publication>> published;  // by fences before tickets, of each cluster
size_t tickets;

u64 cluster = 0, first_cluster = 0;  // clusters are numbered through all launches
u32 block_threads = 1, blocks = 1;   // of a cluster
Knowledge* self;
const char* stack;
u64 stack_bytes;

Cell& cell(u64 address) {
    auto& page = pages[address >> 12];
    if (!page) page.reset(new std::array<Cell, 4096>());
    return (*page)[address & 4095];
}

template <class F>
void for_cells(const void* p, u64 bytes, F f) {
    const u64 begin = reinterpret_cast<u64>(p), end = begin + bytes;
    for (u64 a = begin; a < end;) {
        Cell* c = &cell(a);  // and those after it on the page
        do f(*c++), ++a;
        while (a < end && a % 4096);
    }
}

u32 time_known(const Clock& clock, u32 id) { return clock && id < clock->at.size() ? clock->at[id] : 0; }

// Whether a stamp lies before `clock`.
bool before(Stamp s, const Clock& clock) {
    return s == 0 || cluster_of(s) < first_cluster ||
           (cluster_of(s) == cluster && time_known(clock, id_of(s)) >= time_of(s));
}
// ... or is known to thread k; and whether only through a ticket, after which the thread has not fenced.
bool before(Stamp s, const Knowledge& k, bool* unfenced = nullptr) {
    if (before(s, k.clock) || (cluster_of(s) == cluster && id_of(s) == k.id)) return true;
    for (const Publication& p : published[cluster_of(s)]) {
        if (p.ticket > k.tickets || time_known(p.clock, id_of(s)) < time_of(s)) continue;
        if (unfenced) *unfenced = p.ticket > k.fenced;
        return true;
    }
    return false;
}

std::string who(Stamp s) {
    const u32 id = id_of(s);
    if (id >= block_threads * blocks) return "a message";
    std::string text =
        "thread " + std::to_string(id % block_threads) + " of block " + std::to_string(id / block_threads);
    if (blocks > 1) text += " of the cluster";
    if (cluster_of(s) != cluster)
        text += ", " + std::to_string(cluster - cluster_of(s)) + (blocks > 1 ? " clusters" : " blocks") + " before it,";
    return text;
}

const Extent* extent(const char* p, u64 bytes) {
    static size_t last = 0;
    const auto inside = [&](const Extent& e) { return e.base <= p && p + bytes <= e.base + e.bytes; };
    if (last < extents.size() && inside(extents[last])) return &extents[last];
    for (last = 0; last < extents.size(); ++last)
        if (inside(extents[last])) return &extents[last];
    return nullptr;
}

[[noreturn]] void out_of_bounds(const char* p, u64 bytes, bool write, Where where) {
    std::string near = "nothing";
    i64 least = INT64_MAX;
    for (const Extent& e : extents) {
        const i64 at = p - e.base, distance = at < 0 ? -at : at;
        if (distance < least)
            least = distance,
            near = "byte " + std::to_string(at) + " of " + e.what + ", which has " + std::to_string(e.bytes);
    }
    fail("bounds", where, "%s %llu bytes outside what it was given; the nearest is %s", write ? "writes" : "reads",
         bytes, near.c_str());
}

}  // namespace

void Meeting::add(const Clock& clock) {
    if (!clock || clock == last) return;
    last = clock;
    at.resize(std::max(at.size(), clock->at.size()));
    for (size_t i = 0; i < clock->at.size(); ++i) at[i] = std::max(at[i], clock->at[i]);
    tickets = std::max(tickets, clock->tickets), fenced = std::max(fenced, clock->fenced);
}
void Meeting::add(Knowledge& k) {
    add(k.clock);
    at.resize(std::max(at.size(), size_t(k.id) + 1));
    at[k.id] = k.now++;
    tickets = std::max(tickets, k.tickets), fenced = std::max(fenced, k.fenced);
}
Clock Meeting::close(u32 id, u32 time) {
    at.resize(std::max(at.size(), size_t(id) + 1));
    at[id] = std::max(at[id], time);
    return last = std::make_shared<Known>(*this);
}

void knows(Knowledge& k, const Clock& clock, bool all) {
    if (!clock) return;
    k.tickets = std::max(k.tickets, clock->tickets), k.fenced = std::max(k.fenced, clock->fenced);
    if (all || !k.clock) {
        k.clock = clock;
    } else if (k.clock != clock) {
        static Clock one, two, both;  // the threads of a block ask the same, one after another
        if (one != k.clock || two != clock) {
            Meeting joined;
            joined.add(one = k.clock);
            joined.add(two = clock);
            both = joined.close();
        }
        k.clock = both;
    }
}

void launch_begins(const Region* regions, int n) {
    extents.clear();
    for (int i = 0; i < n; ++i)
        extents.push_back({regions[i].base, regions[i].bytes, "argument " + std::to_string(regions[i].argument),
                           regions[i].writable != 0});
    arguments = extents.size();
    published.clear();
    tickets = 0;
    first_cluster = cluster + 1;
}
void cluster_begins(u32 threads, u32 n) { ++cluster, block_threads = threads, blocks = n; }
void runs(Knowledge* k, const char* base, u64 bytes) { self = k, stack = base, stack_bytes = bytes; }

void declare(const void* p, u64 bytes, const std::string& what) {
    extents.push_back({static_cast<const char*>(p), bytes, what, true});
    for_cells(p, bytes, [](Cell& c) { c = {UNWRITTEN, {0, 0}}; });
}
void forget() {
    for (size_t i = arguments; i < extents.size(); ++i)
        for_cells(extents[i].base, extents[i].bytes, [](Cell& c) { c = Cell(); });
    extents.resize(arguments);
}

void fence() {
    Meeting m;
    m.add(*self);
    self->published = m.close();
    self->fenced = self->tickets;
}
void ticket() {
    if (self->published) published[cluster].push_back({++tickets, self->published});
    self->tickets = tickets;
}

void access(const void* at, u64 bytes, Access kind, Where where) {
    const char* p = static_cast<const char*>(at);
    if (!self || (stack <= p && p < stack + stack_bytes)) return;
    const bool write = kind == WRITE || kind == ATOMIC;
    const Extent* e = extent(p, bytes);
    Dl_info module;
    if (!e && !write && dladdr(p, &module)) return;  // a constant of the kernel's own
    if (!e) out_of_bounds(p, bytes, write, where);
    if (kind == PREFETCH) return;  // reads no value
    const auto name = [&] { return "byte " + std::to_string(p - e->base) + " of " + e->what; };
    const Stamp now = stamp(cluster, self->id, self->now, kind == ATOMIC);
    if (write && !e->writable) fail("bounds", where, "writes %s, which is read-only", name().c_str());
    for_cells(p, bytes, [&](Cell& c) {
        bool unfenced = false;
        if (c.written == UNWRITTEN) {
            if (kind != WRITE) fail("uninitialised", where, "reads %s, which nobody has written", name().c_str());
        } else if (!(kind == ATOMIC && atomic(c.written)) && !before(c.written, *self, &unfenced)) {
            fail("race", where, "%s %s, which %s wrote; nothing orders the two", write ? "writes" : "reads",
                 name().c_str(), who(c.written).c_str());
        }
        if (kind == READ && unfenced)
            fail("l1", where,
                 "reads %s, which %s wrote in this launch, past no fence: ld_l2, or fence_gpu after the ticket",
                 name().c_str(), who(c.written).c_str());
        if (write) {
            for (Stamp r : c.read)
                if (!(kind == ATOMIC && atomic(r)) && !before(r, *self))
                    fail("race", where, "writes %s, which %s reads; nothing orders the two", name().c_str(),
                         who(r).c_str());
            c = {now, {0, 0}};
        } else if (c.read[0] != now && c.read[1] != now) {
            c.read[before(c.read[0], *self) ? 0 : 1] = now;
        }
    });
}

void message(const void* p, u64 bytes, const Clock& sender, u32 id, u32 time, Where where) {
    for_cells(p, bytes, [&](Cell& c) {
        for (Stamp s : {c.written == UNWRITTEN ? 0 : c.written, c.read[0], c.read[1]})
            if (!before(s, sender))
                fail("race", where, "this message overwrites what %s last touched; nothing orders the two",
                     who(s).c_str());
        c = {stamp(cluster, id, time), {0, 0}};
    });
}

}  // namespace simt::check

// Marks memory of the caller's as unwritten, or as written long ago.
extern "C" void simt_mark(const void* p, u64 bytes, int unwritten) {
    simt::check::for_cells(p, bytes,
                           [=](simt::check::Cell& c) { c = {unwritten ? simt::check::UNWRITTEN : 0, {0, 0}}; });
}

// What g++ -fsanitize=thread calls.
namespace {
void touch(const void* p, u64 bytes, simt::Access kind, const void* pc) {
    if (simt::check::self && reinterpret_cast<u64>(p) % bytes)
        simt::fail("misaligned", pc, "touches %llu bytes at an address that is no multiple of %llu", bytes, bytes);
    simt::check::access(p, bytes, kind, pc);
}
}  // namespace
#define PC __builtin_return_address(0)
#define TSAN(n)                                                                     \
    void __tsan_read##n(const void* p) { touch(p, n, simt::READ, PC); }             \
    void __tsan_write##n(const void* p) { touch(p, n, simt::WRITE, PC); }           \
    void __tsan_unaligned_read##n(const void* p) { touch(p, n, simt::READ, PC); }   \
    void __tsan_unaligned_write##n(const void* p) { touch(p, n, simt::WRITE, PC); } \
    void __tsan_volatile_read##n(const void* p) { touch(p, n, simt::READ_L2, PC); } \
    void __tsan_volatile_write##n(const void* p) { touch(p, n, simt::WRITE, PC); }
extern "C" {
// clang-format off
TSAN(1) TSAN(2) TSAN(4) TSAN(8) TSAN(16)
// clang-format on
void __tsan_read_range(const void* p, u64 n) { simt::check::access(p, n, simt::READ, PC); }
void __tsan_write_range(const void* p, u64 n) { simt::check::access(p, n, simt::WRITE, PC); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
