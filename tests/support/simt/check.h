// What the machine (simt.cpp) tells the checker (check.cpp). In other builds all of this is empty.
//
// Happens-before. Every thread of a cluster has a number, and a time that advances whenever it releases something to
// others. A Clock holds the time up to which each of them is known; a thread has one, shared with those it last met.
// An access leaves a stamp (cluster, thread, time) on the memory; a later access by another thread is a race unless its
// clock covers that stamp. Messages (st_async16) write on behalf of their barrier, whose time is its phase.

#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "simt.h"  // the part for the machine

namespace simt {

struct Where {  // in the source: a line, or a return address
    int line = 0;
    const void* pc = nullptr;
    Where(int line) : line(line) {}
    Where(const void* pc) : pc(pc) {}
};

// Ends the launch with "kind: thread … text".
[[noreturn]] void fail(const char* kind, Where where, const char* format, ...) __attribute__((format(printf, 3, 4)));

struct Region {
    const char* base;
    u64 bytes;
    int writable, argument;
};  // what the launch may touch

namespace check {

#ifdef SIMT_CHECK

struct Known {
    std::vector<u32> at;             // for each thread, the time up to which it is known
    size_t tickets = 0, fenced = 0;  // how much of the log of tickets is known; and is behind a fence
};
typedef std::shared_ptr<const Known> Clock;

struct Knowledge {           // of one thread
    u32 id = 0, now = 1;     // its own time is not in its clock
    Clock clock, published;  // published by its last fence_gpu
    size_t tickets = 0, fenced = 0;
};

struct Meeting : Known {  // collects what threads know
    Clock last;
    void add(const Clock& clock);
    void add(Knowledge& k);
    Clock close(u32 id = 0, u32 time = 0);  // what all of them know then, and that `id` is at `time`
};

void launch_begins(const Region* regions, int n);
void cluster_begins(u32 block_threads, u32 blocks);
void runs(Knowledge* k, const char* stack, u64 stack_bytes);  // nullptr: no thread of a kernel
void knows(Knowledge& k, const Clock& clock, bool all);       // merges it; all: it includes all that k knew
void access(const void* p, u64 bytes, Access kind, Where where);
void message(const void* p, u64 bytes, const Clock& sender, u32 id, u32 time, Where where);
void fence();
void ticket();
void declare(const void* p, u64 bytes, const std::string& what);  // shared memory, unwritten
void forget();                                                    // all of it

#else

struct Clock {};
struct Knowledge {
    u32 id;
};
struct Meeting {
    void add(Knowledge&) {}
    void add(const Clock&) {}
    Clock close(u32 = 0, u32 = 0) { return {}; }
};
inline void launch_begins(const Region*, int) {}
inline void cluster_begins(u32, u32) {}
inline void runs(Knowledge*, const char*, u64) {}
inline void knows(Knowledge&, const Clock&, bool) {}
inline void access(const void*, u64, Access, Where) {}
inline void message(const void*, u64, const Clock&, u32, u32, Where) {}
inline void fence() {}
inline void ticket() {}
inline void declare(const void*, u64, const std::string&) {}
inline void forget() {}

#endif

}  // namespace check
}  // namespace simt
