// Runs CUDA kernels on the CPU: the same .cu is compiled by g++ with -DEFRDN_FAST_SIMT.
//
// Every CUDA thread of a block is a fiber; blocks run one after the other. A fiber runs until it
// meets a barrier or a warp collective and then waits for the threads that must meet it there.
// Reported as an error, with block, threads and source line, exit status 3: a barrier or collective
// that some of its threads never reach or reach elsewhere, a shuffle that reads a lane taking no
// part. Shared memory holds NaN bytes when a block starts. Memory errors are AddressSanitizer's
// (buffer.h puts guard zones around global memory; the fibers are announced to it).
//
// SIMT_ORDER=forward|reverse|<seed> is the order in which the threads run between barriers: results
// that differ between orders are races.
#pragma once

#include <cuda_runtime.h>
#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#ifndef __OPTIMIZE__
#error "build with -O1 or more"
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

namespace simt {

inline constexpr int kWarp = 32;
inline constexpr size_t kStackBytes = 256 << 10;
inline constexpr int kFailed = 3;  // exit status

struct Site {
  const char* file;
  int line;
};

enum class State { kReady, kAtBarrier, kAtCollective, kDone };

// Executes a warp collective once all its lanes have arrived; `lanes[i]` is the argument of lane i,
// null outside the mask.
using Collective = void (*)(unsigned mask, void* const* lanes);

struct Fiber {
  ucontext_t entry;
  void* jump[5];
  bool started = false;
  void* fake_stack = nullptr;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  uint3 thread;
  State state = State::kDone;
  int barriers = 0;  // block barriers passed in this block
  Site site{};       // where it waits, what for
  const char* name = nullptr;
  unsigned mask = 0;
  Collective collective = nullptr;
  void* argument = nullptr;
};

inline std::vector<std::unique_ptr<Fiber>> fibers;
inline int threads;  // of the block; fibers[0 .. threads) run
inline int current;
inline void* scheduler_jump[5];
inline void* scheduler_fake_stack;
inline const void* scheduler_stack;
inline size_t scheduler_stack_bytes;
inline std::function<void()> body;
inline uint3 block;
inline dim3 block_dim, grid_dim;
inline std::unique_ptr<char[]> dynamic_bytes;

[[noreturn]] inline void fail(const char* format, ...) {
  std::fprintf(stderr, "simt: block (%u,%u,%u): ", block.x, block.y, block.z);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::fflush(stderr);
  std::_Exit(kFailed);
}

// One line on where a thread stands.
inline std::string describe(int index) {
  const Fiber& f = *fibers[index];
  char text[512];
  int length =
      std::snprintf(text, sizeof text, "thread (%u,%u,%u) ", f.thread.x, f.thread.y, f.thread.z);
  if (f.state == State::kDone)
    std::snprintf(text + length, sizeof text - length, "has exited after %d barriers", f.barriers);
  else
    std::snprintf(text + length, sizeof text - length, "waits at %s, %s:%d, after %d barriers",
                  f.name, f.site.file, f.site.line, f.barriers);
  return text;
}

// Switching is by __builtin_setjmp: 20 times faster than swapcontext, which makes system calls.
// noipa: other fibers run inside, which no analysis of these functions sees.
#define SIMT_PLAIN __attribute__((noipa, no_sanitize("address")))

// A function of its own: g++ loses the way back of a setjmp in the function of a longjmp.
[[noreturn]] SIMT_PLAIN inline void jump(void** to) { __builtin_longjmp(to, 1); }

SIMT_PLAIN inline void resume(int index) {
  Fiber& f = *fibers[index];
  current = index;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, f.stack.get(), kStackBytes);
  if (__builtin_setjmp(scheduler_jump) == 0) {
    if (f.started) jump(f.jump);
    f.started = true;
    setcontext(&f.entry);
  }
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
}

SIMT_PLAIN inline void yield() {
  Fiber& f = *fibers[current];
  __sanitizer_start_switch_fiber(&f.fake_stack, scheduler_stack, scheduler_stack_bytes);
  if (__builtin_setjmp(f.jump) == 0) jump(scheduler_jump);
  __sanitizer_finish_switch_fiber(fibers[current]->fake_stack, nullptr, nullptr);
}

// A fiber outlives its block: it runs the body once per resume from kDone.
SIMT_PLAIN inline void fiber_main() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  for (;;) {
    body();
    fibers[current]->state = State::kDone;
    yield();
  }
}

inline void wait(State state, Site site, const char* name) {
  Fiber& f = *fibers[current];
  f.state = state;
  f.site = site;
  f.name = name;
  yield();
}

inline void warp_collective(unsigned mask, Collective collective, void* argument, const char* name,
                            Site site) {
  Fiber& f = *fibers[current];
  if (!(mask >> (current % kWarp) & 1))
    fail("thread %d calls %s, %s:%d, with a mask (%08x) that leaves itself out", current, name,
         site.file, site.line, mask);
  f.mask = mask;
  f.collective = collective;
  f.argument = argument;
  wait(State::kAtCollective, site, name);
}

// Runs one collective of the warp that starts at thread `first`, if one is complete.
inline bool resolve_warp(int first) {
  const int lanes = std::min(kWarp, threads - first);
  for (int leader = 0; leader < lanes; leader++) {
    const Fiber& l = *fibers[first + leader];
    if (l.state != State::kAtCollective) continue;
    void* arguments[kWarp] = {};
    bool complete = true;
    for (int i = 0; i < kWarp; i++) {
      if (!(l.mask >> i & 1)) continue;
      if (i >= lanes)
        fail("%s: its mask (%08x) names lanes that do not exist", describe(first + leader).c_str(),
             l.mask);
      const Fiber& f = *fibers[first + i];
      if (f.state == State::kReady) {
        complete = false;
        break;
      }
      if (f.state != State::kAtCollective || f.mask != l.mask || f.collective != l.collective ||
          f.site.line != l.site.line || f.site.file != l.site.file)
        fail("%s, but %s", describe(first + leader).c_str(), describe(first + i).c_str());
      arguments[i] = f.argument;
    }
    if (!complete) continue;
    l.collective(l.mask, arguments);
    const unsigned mask = l.mask;
    for (int i = 0; i < lanes; i++)
      if (mask >> i & 1) fibers[first + i]->state = State::kReady;
    return true;
  }
  return false;
}

inline void release_barrier() {
  const Fiber& first = *fibers[0];
  for (int i = 0; i < threads; i++) {
    const Fiber& f = *fibers[i];
    if (f.state != State::kAtBarrier || f.site.line != first.site.line ||
        f.site.file != first.site.file)
      fail("%s, but %s", describe(0).c_str(), describe(i).c_str());
  }
  for (int i = 0; i < threads; i++) {
    fibers[i]->barriers++;
    fibers[i]->state = State::kReady;
  }
}

// Static shared memory is this program's or library's thread-local storage (see __shared__ below).
inline void poison_shared(size_t dynamic_shared_bytes) {
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        const auto here = reinterpret_cast<uintptr_t>(&poison_shared) - info->dlpi_addr;
        const auto* const first = info->dlpi_phdr;
        const auto* const last = first + info->dlpi_phnum;
        const auto holds = [&](const auto& h) {
          return h.p_type == PT_LOAD && here - h.p_vaddr < h.p_memsz;
        };
        if (std::none_of(first, last, holds)) return 0;
        for (const auto* h = first; h != last; h++)
          if (h->p_type == PT_TLS && info->dlpi_tls_data)  // null before a library's first access
            std::memset(info->dlpi_tls_data, 0xff, h->p_memsz);
        return 1;
      },
      nullptr);
  std::memset(dynamic_bytes.get(), 0xff, dynamic_shared_bytes);
}

struct Order {
  bool reverse = false, shuffle = false;
  std::mt19937 random;
  std::vector<int> indices;

  Order() {
    const char* text = std::getenv("SIMT_ORDER");
    if (!text || !std::strcmp(text, "forward")) return;
    reverse = !std::strcmp(text, "reverse");
    shuffle = !reverse;
    if (shuffle) random.seed(std::strtoul(text, nullptr, 10));
  }
  const std::vector<int>& of(int count) {
    indices.resize(count);
    std::iota(indices.begin(), indices.end(), 0);
    if (reverse) std::reverse(indices.begin(), indices.end());
    if (shuffle) std::shuffle(indices.begin(), indices.end(), random);
    return indices;
  }
};

inline void run_block() {
  static Order warp_order, lane_order;
  const int warps = (threads + kWarp - 1) / kWarp;
  for (int i = 0; i < threads; i++) {
    fibers[i]->state = State::kReady;
    fibers[i]->barriers = 0;
  }
  for (;;) {
    bool moved = false;
    for (const int warp : warp_order.of(warps)) {
      const int first = warp * kWarp;
      for (bool again = true; again;) {
        again = false;
        for (const int lane : lane_order.of(std::min(kWarp, threads - first)))
          if (fibers[first + lane]->state == State::kReady) {
            resume(first + lane);
            again = moved = true;
          }
        again |= resolve_warp(first);
        if (warp_order.shuffle) break;  // another warp may go first
      }
    }
    if (moved) continue;
    bool alive = false;
    for (int i = 0; i < threads; i++) alive |= fibers[i]->state != State::kDone;
    if (!alive) return;
    release_barrier();
  }
}

inline void launch(dim3 grid, dim3 block_shape, size_t dynamic_shared_bytes,
                   std::function<void()> kernel) {
  threads = block_shape.x * block_shape.y * block_shape.z;
  if (threads < 1 || threads > 1024 || grid.y > 65535 || grid.z > 65535 ||
      static_cast<uint64_t>(grid.x) * grid.y * grid.z == 0)
    fail("launch with grid (%u,%u,%u) and %d threads", grid.x, grid.y, grid.z, threads);
  grid_dim = grid;
  block_dim = block_shape;
  body = std::move(kernel);
  dynamic_bytes.reset(new char[dynamic_shared_bytes]);
  while (static_cast<int>(fibers.size()) < threads) {
    auto f = std::make_unique<Fiber>();
    getcontext(&f->entry);
    f->entry.uc_stack.ss_sp = f->stack.get();
    f->entry.uc_stack.ss_size = kStackBytes;
    makecontext(&f->entry, fiber_main, 0);
    fibers.push_back(std::move(f));
  }
  for (int i = 0; i < threads; i++)
    fibers[i]->thread = {i % block_dim.x, i / block_dim.x % block_dim.y,
                         i / block_dim.x / block_dim.y};
  for (block.z = 0; block.z < grid.z; block.z++)
    for (block.y = 0; block.y < grid.y; block.y++)
      for (block.x = 0; block.x < grid.x; block.x++) {
        poison_shared(dynamic_shared_bytes);
        run_block();
      }
}

template <class T>
struct Exchange {
  T value, result;
  int source;  // lane
};

template <class T>
T shuffle(unsigned mask, T value, int source, const char* name, Site site) {
  Exchange<T> mine{value, value, source};
  warp_collective(
      mask,
      [](unsigned mask, void* const* lanes) {
        for (int i = 0; i < kWarp; i++) {
          auto* to = static_cast<Exchange<T>*>(lanes[i]);
          if (!to) continue;
          if (!lanes[to->source])
            fail("lane %d shuffles from lane %d, which its mask (%08x) leaves out", i, to->source,
                 mask);
          to->result = static_cast<Exchange<T>*>(lanes[to->source])->value;
        }
      },
      &mine, name, site);
  return mine.result;
}

// Lane `source` of the segment of `width` lanes, or the calling lane if it lies outside.
inline int source_lane(int source, int width) {
  const int lane = current % kWarp, segment = lane & ~(width - 1);
  return source < segment || source >= segment + width ? lane : source;
}

}  // namespace simt

#include "simt_intrinsics.h"
