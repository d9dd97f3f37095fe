// Runs CUDA kernels on a CPU: a block's threads are fibers that meet at barriers, shuffles, votes and mma.
//
// Clusters of blocks run one after another, so races between them do not show; what shows is wrong indexing, wrong
// shapes, wrong order of operands and unwritten results. While something is on its way to shared memory, a cluster's
// warps run at uneven speeds, by fixed dice.
#pragma once

#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __constant__ static const
#define __launch_bounds__(...)

struct Three {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

static Three blockIdx, blockDim, gridDim, threadIdx;

namespace emulated {

struct Operands {
  std::array<unsigned, 6> of[32];
};

struct Warp {
  int lanes = 0, waiting = 0, round = 0;
  Operands operands[2];
};

struct Copy {
  void* to;
  const void* from;
  int bytes, zeros;
};

// What is done when it is awaited and no earlier, in groups.
struct Groups {
  std::vector<std::function<void()>> open;
  std::deque<std::vector<std::function<void()>>> closed;

  void add(std::function<void()> one) { open.push_back(std::move(one)); }
  void close() {
    closed.push_back(std::move(open));
    open.clear();
  }
  void await(size_t pending) {
    for (; closed.size() > pending; closed.pop_front())
      for (const auto& one : closed.front()) one();
  }
};

struct Thread {
  ucontext_t context;
  Three index;
  int number, rounds = 0, cluster_rounds = 0;
  bool done = false;
  std::vector<Copy> open;                // asynchronous copies, made when they are waited for and no earlier
  std::deque<std::vector<Copy>> closed;  // in groups
  Groups products;
};

constexpr size_t SHARED_BYTES = 227 << 10;

struct Gate {
  int waiting = 0, round = 0;
};

struct Block {
  Three index;
  Gate gates[16];  // barriers of some of the block's warps
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  int live = 0, waiting = 0, round = 0;
  bool resting[32] = {};                    // warps that let the others run ahead
  std::unique_ptr<unsigned char[]> memory;  // dynamic shared memory, asked for by `dynamic_shared`

  unsigned char* dynamic_shared() {
    if (!memory) {
      memory.reset(new unsigned char[SHARED_BYTES + 1024]);
      memset(memory.get(), 0xff, SHARED_BYTES + 1024);  // NaN in every format
    }
    return memory.get() + (1024 - reinterpret_cast<size_t>(memory.get()) % 1024);
  }
};

static std::vector<Block>* cluster;  // the blocks that run together
static int cluster_waiting, cluster_round;
static Block* block;
static Thread* current;
static ucontext_t scheduler;
static const std::function<void()>* body;

inline void yield() { swapcontext(&current->context, &scheduler); }
inline int lane() { return current->number % 32; }

static unsigned dice;
inline unsigned roll(unsigned sides) {
  dice = dice * 1664525u + 1013904223u;
  return (dice >> 16) % sides;
}

// What lands in shared memory some steps of the cluster after it was asked for, in any order.
constexpr unsigned LONGEST_FLIGHT = 20, REST = 7;  // steps
struct Flight {
  long due;
  std::function<void()> land;
};
static std::vector<Flight> flights;
static long steps;
inline void land_later(std::function<void()> land) {
  flights.push_back({steps + 1 + long(roll(LONGEST_FLIGHT)), std::move(land)});
}
inline void land_those_due() {
  for (size_t i = 0; i < flights.size();) {
    if (flights[i].due > steps) {
      ++i;
      continue;
    }
    const Flight one = std::move(flights[i]);
    flights.erase(flights.begin() + long(i));
    one.land();
  }
}

// What the kernel before has still to write. A thread that waits for it lets all others run ahead for some rounds.
struct Late {
  void* to;
  const void* from;
  size_t bytes;
};
static std::vector<Late> late;
inline void await_previous() {
  for (int round = 0; round < 20 && !late.empty(); ++round) yield();
  for (const Late& one : late) memcpy(one.to, one.from, one.bytes);
  late.clear();
}

// Leave this lane's words, wait for the warp, see everybody's. Two buffers: nobody is two rounds ahead.
inline const Operands& exchange(const std::array<unsigned, 6>& mine) {
  Warp& warp = block->warps[current->number / 32];
  Operands& shared = warp.operands[warp.round % 2];
  shared.of[lane()] = mine;
  const int round = warp.round;
  if (++warp.waiting == warp.lanes) {
    warp.waiting = 0;
    ++warp.round;
  }
  while (warp.round == round) yield();
  return shared;
}

inline void barrier() {
  const int round = block->round;
  if (++block->waiting == block->live) {
    block->waiting = 0;
    ++block->round;
  }
  while (block->round == round) yield();
}

inline void entry() {
  (*body)();
  current->done = true;
  swapcontext(&current->context, &scheduler);
}

inline void start_block(Block& here, Three size, std::vector<char>* stacks) {
  const int count = int(size.x * size.y * size.z);
  here.warps.resize((count + 31) / 32);
  here.live = count;
  for (int i = 0; i < count; ++i) {
    stacks[i].resize(1 << 16);
    here.warps[i / 32].lanes++;
    here.threads.emplace_back(new Thread);
    Thread& thread = *here.threads.back();
    thread.number = i;
    thread.index = {unsigned(i) % size.x, unsigned(i) / size.x % size.y, unsigned(i) / (size.x * size.y)};
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stacks[i].data();
    thread.context.uc_stack.ss_size = stacks[i].size();
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, entry, 0);
  }
}

// Every thread of the block until it waits or is done.
inline void step_block(Block& here) {
  block = &here;
  blockIdx = here.index;
  for (auto& thread : here.threads) {
    if (thread->done || here.resting[thread->number / 32]) continue;
    current = thread.get();
    threadIdx = current->index;
    swapcontext(&scheduler, &current->context);
    if (!current->done) continue;
    Warp& warp = here.warps[current->number / 32];
    --here.live;
    --warp.lanes;
    if (here.live && here.waiting == here.live) {
      here.waiting = 0;
      ++here.round;
    }
    if (warp.lanes && warp.waiting) {
      fprintf(stderr, "a lane left while its warp exchanged values\n");
      abort();
    }
  }
}

inline void run_cluster(const std::vector<Three>& indices, Three size, const std::function<void()>& kernel,
                        std::vector<std::vector<char>>& stacks) {
  std::vector<Block> blocks(indices.size());
  const size_t count = size.x * size.y * size.z;
  stacks.resize(count * blocks.size());
  cluster = &blocks;
  cluster_waiting = cluster_round = 0;
  body = &kernel;
  for (size_t i = 0; i < blocks.size(); ++i) {
    blocks[i].index = indices[i];
    start_block(blocks[i], size, &stacks[i * count]);
  }
  dice = 1;
  for (steps = 0;; ++steps) {
    if (steps > 10000000) abort();  // a barrier that not all reach
    int live = 0;
    land_those_due();
    for (Block& one : blocks) {
      if (steps % REST == 0)
        for (bool& warp : one.resting) warp = !flights.empty() && roll(3) == 0;
      if (one.live > 0) step_block(one);
      live += one.live;
    }
    if (live > 0) continue;
    if (!flights.empty()) abort();  // nobody waited for them
    return;
  }
}

inline void run_grid(const unsigned* grid, const unsigned* size, unsigned of_a_cluster,
                     const std::function<void()>& kernel) {
  std::vector<std::vector<char>> stacks;
  gridDim = {grid[0], grid[1], grid[2]};
  blockDim = {size[0], size[1], size[2]};
  for (unsigned z = 0; z < grid[2]; ++z)
    for (unsigned y = 0; y < grid[1]; ++y)
      for (unsigned x = 0; x < grid[0]; x += of_a_cluster) {
        std::vector<Three> indices;
        for (unsigned i = 0; i < of_a_cluster; ++i) indices.push_back({x + i, y, z});
        run_cluster(indices, blockDim, kernel, stacks);
      }
}

template <class T>
constexpr char letter() {
  if (std::is_pointer<T>::value) return 'P';
  if (std::is_class<T>::value) return 'T';
  if (std::is_floating_point<T>::value) return 'f';
  return sizeof(T) == 8 ? 'q' : 'i';
}

template <class... A, size_t... I>
void invoke(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_const_t<A>*>(args[I])...);
}

// Returns 1 when the host's signature is not the kernel's.
template <class... A>
int launch(void (*kernel)(A...), const unsigned* grid, const unsigned* size, unsigned of_a_cluster, void** args,
           const char* signature) {
  const char own[] = {letter<A>()..., 0};
  if (strcmp(own, signature) != 0) return 1;
  run_grid(grid, size, of_a_cluster, [=] { invoke(kernel, args, std::index_sequence_for<A...>()); });
  return 0;
}

}  // namespace emulated

inline void __syncthreads() { emulated::barrier(); }
inline void __threadfence() {}
inline int atomicAdd(int* p, int x) {
  const int old = *p;
  *p += x;
  return old;
}
inline unsigned atomicAdd(unsigned* p, unsigned x) {
  const unsigned old = *p;
  *p += x;
  return old;
}
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long x) {
  const unsigned long long old = *p;
  *p += x;
  return old;
}
inline unsigned atomicMin(unsigned* p, unsigned x) {
  const unsigned old = *p;
  *p = x < old ? x : old;
  return old;
}
inline unsigned atomicMax(unsigned* p, unsigned x) {
  const unsigned old = *p;
  *p = x > old ? x : old;
  return old;
}
inline int atomicCAS(int* p, int expected, int x) {
  const int old = *p;
  if (old == expected) *p = x;
  return old;
}
inline unsigned long long atomicMax(unsigned long long* p, unsigned long long x) {
  const unsigned long long old = *p;
  *p = x > old ? x : old;
  return old;
}
inline unsigned long long atomicExch(unsigned long long* p, unsigned long long x) {
  return std::exchange(*p, x);
}
inline float __int_as_float(int x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline float __uint_as_float(unsigned x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  memcpy(&y, &x, 4);
  return y;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rd(float x, float y) {
  const double sum = double(x) + y;
  const float near = float(sum);
  return near > sum ? nextafterf(near, -INFINITY) : near;
}
inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1.0f) : 0.0f; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __shfl_xor_sync(unsigned, float x, int mask) {
  return __uint_as_float(emulated::exchange({{__float_as_uint(x)}}).of[emulated::lane() ^ mask][0]);
}
inline int __shfl_xor_sync(unsigned, int x, int mask) {
  return int(emulated::exchange({{unsigned(x)}}).of[emulated::lane() ^ mask][0]);
}
inline float __shfl_sync(unsigned, float x, int from) {
  return __uint_as_float(emulated::exchange({{__float_as_uint(x)}}).of[from % 32][0]);
}
inline int __shfl_sync(unsigned, int x, int from) {
  return int(emulated::exchange({{unsigned(x)}}).of[from % 32][0]);
}
inline unsigned __reduce_max_sync(unsigned, unsigned x) {
  const emulated::Operands& all = emulated::exchange({{x}});
  for (const auto& one : all.of) x = one[0] > x ? one[0] : x;
  return x;
}
inline unsigned __reduce_min_sync(unsigned, unsigned x) {
  const emulated::Operands& all = emulated::exchange({{x}});
  for (const auto& one : all.of) x = one[0] < x ? one[0] : x;
  return x;
}
inline unsigned __reduce_add_sync(unsigned, unsigned x) {
  const emulated::Operands& all = emulated::exchange({{x}});
  x = 0;
  for (const auto& one : all.of) x += one[0];
  return x;
}
inline void __syncwarp() { emulated::exchange({}); }
inline int __shfl_up_sync(unsigned, int x, int lanes) {
  const emulated::Operands& all = emulated::exchange({{unsigned(x)}});
  return emulated::lane() < lanes ? x : int(all.of[emulated::lane() - lanes][0]);
}
inline bool __any_sync(unsigned, bool x) {
  const emulated::Operands& all = emulated::exchange({{unsigned(x)}});
  for (const auto& one : all.of)
    if (one[0]) return true;
  return false;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned order) {
  const unsigned long long both = x | (unsigned long long)y << 32;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= unsigned(both >> ((order >> (4 * i) & 7) * 8) & 0xff) << (8 * i);
  return out;
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned min(unsigned x, unsigned y) { return x < y ? x : y; }
inline unsigned max(unsigned x, unsigned y) { return x > y ? x : y; }
inline int min(int x, int y) { return x < y ? x : y; }
inline int max(int x, int y) { return x > y ? x : y; }
