/* CUDA kernels on a processor: a block at a time, each of its threads on a stack of its own, until all wait for each other.
 *
 * As much of the language as TVM's kernels use. Threads take turns at barriers and shuffles only, in one order and then in
 * the other, so that what works by the order of threads alone does not work here. */

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <ucontext.h>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(count)
#define __shared__ static /* blocks run one after the other */
#define __align__(bytes) __attribute__((aligned(bytes)))
#define alignas(bytes) __attribute__((aligned(bytes)))
#define __CUDA_ARCH__ 870

struct Dimensions {
  unsigned x, y, z;
};
static Dimensions threadIdx, blockIdx;

template <typename T>
struct Two {
  T x, y;
};
template <typename T>
struct Four {
  T x, y, z, w;
};
using float2 = Two<float>;
using float4 = Four<float>;
using int2 = Two<int>;
using int4 = Four<int>;
using longlong2 = Two<long long>;
using longlong4 = Four<long long>;
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static int2 make_int2(int x, int y) { return {x, y}; }
static int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
static longlong2 make_longlong2(long long x, long long y) { return {x, y}; }
static longlong4 make_longlong4(long long x, long long y, long long z, long long w) { return {x, y, z, w}; }

struct half {
  uint16_t bits;
  half() = default;
  half(float value) : bits(0) {
    if (value != 0) abort(); /* kernels here read halves and write none */
  }
  operator float() const {
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16, magnitude = (uint32_t)(bits & 0x7fff) << 13;
    float value;
    memcpy(&value, &magnitude, 4);
    value *= 0x1p112f; /* the difference of the exponents' biases */
    return sign ? -value : value;
  }
};
using __half = half;
using half2 = Two<half>;
using __half2 = half2;
static float __half2float(half value) { return value; }
static half __float2half(float value) { return value; }
static bool __hgt(half a, half b) { return (float)a > (float)b; }
static bool __hlt(half a, half b) { return (float)a < (float)b; }

template <typename T>
static T max(T a, T b) { return a > b ? a : b; }
template <typename T>
static T min(T a, T b) { return a < b ? a : b; }
static float rsqrtf(float x) { return 1 / sqrtf(x); }
#define __expf expf

/* --- threads of a block ------------------------------------------------------------------------ */

enum { MOST_THREADS = 1024, WARP = 32, STACK_BYTES = 1 << 16 };
enum State { RUNS, AT_BARRIER, AT_SHUFFLE, DONE };

static struct Thread {
  ucontext_t context;
  Dimensions index;
  State state;
} threads[MOST_THREADS];
static char stacks[MOST_THREADS][STACK_BYTES] __attribute__((aligned(64)));
static ucontext_t scheduler;
static unsigned current, count;
static void (*body)(void *);
static void *argument;
static float exchanged[2][MOST_THREADS]; /* what a thread hands its warp, and at the next shuffle, while others still read */
static unsigned shuffles[MOST_THREADS];

static void wait(State state) {
  threads[current].state = state;
  swapcontext(&threads[current].context, &scheduler);
}

static void __syncthreads() { wait(AT_BARRIER); }
static unsigned __activemask() { return ~0u; }

static float exchange(float value, unsigned lane, int width) {
  unsigned first = current / WARP * WARP, mine = current - first, turn = shuffles[current]++ & 1;
  exchanged[turn][current] = value;
  wait(AT_SHUFFLE);
  bool inside = mine / width == lane / width && first + lane < count;
  return exchanged[turn][inside ? first + lane : current];
}

static float __shfl_down_sync(unsigned, float value, unsigned delta, int width) { return exchange(value, current % WARP + delta, width); }
static float __shfl_sync(unsigned, float value, unsigned lane, int width) {
  return exchange(value, current % WARP / width * width + lane % width, width);
}

static void run() {
  body(argument);
  threads[current].state = DONE;
  setcontext(&scheduler);
}

/* Those that wait go on when all others of their warp, or of the block, wait or are done. */
static bool released() {
  bool any = false, all = true;
  for (unsigned first = 0; first < count; first += WARP) {
    unsigned end = min(first + WARP, count);
    bool whole = true, shuffling = false;
    for (unsigned t = first; t < end; ++t) {
      whole &= threads[t].state != RUNS;
      shuffling |= threads[t].state == AT_SHUFFLE;
    }
    for (unsigned t = first; t < end && whole && shuffling; ++t)
      if (threads[t].state == AT_SHUFFLE) threads[t].state = RUNS;
    any |= whole && shuffling;
  }
  for (unsigned t = 0; t < count; ++t) all &= threads[t].state == AT_BARRIER || threads[t].state == DONE;
  bool waits = false;
  for (unsigned t = 0; t < count && all; ++t)
    if (threads[t].state == AT_BARRIER) threads[t].state = RUNS, waits = true;
  return any || waits;
}

static void run_block(Dimensions block) {
  count = block.x * block.y * block.z;
  for (unsigned t = 0; t < count; ++t) {
    Thread &thread = threads[t];
    thread.index = {t % block.x, t / block.x % block.y, t / (block.x * block.y)};
    thread.state = RUNS;
    shuffles[t] = 0;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = stacks[t];
    thread.context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&thread.context, run, 0);
  }
  unsigned round = 0;
  do {
    for (unsigned i = 0; i < count; ++i) {
      current = round & 1 ? count - 1 - i : i;
      if (threads[current].state != RUNS) continue;
      threadIdx = threads[current].index;
      swapcontext(&scheduler, &threads[current].context);
    }
    ++round;
  } while (released());
  for (unsigned t = 0; t < count; ++t)
    if (threads[t].state != DONE) {
      fprintf(stderr, "thread %u of a block waits for ever\n", t);
      abort();
    }
}

/* Runs a kernel; one that neither waits nor shuffles runs thread by thread on this stack. */
template <typename Kernel>
static int launch(Dimensions grid, Dimensions block, bool waits, Kernel kernel) {
  if (block.x * block.y * block.z > MOST_THREADS || !grid.x || !grid.y || !grid.z) return -1;
  body = [](void *kernel) { (*(Kernel *)kernel)(); };
  argument = &kernel;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        if (waits) {
          run_block(block);
          continue;
        }
        for (threadIdx.z = 0; threadIdx.z < block.z; ++threadIdx.z)
          for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y)
            for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) kernel();
      }
  return 0;
}

/* --- how TVM calls a kernel -------------------------------------------------------------------- */

struct Packed { /* TVMFFIAny in tvm/ffi/c_api.h */
  int32_t kind;
  uint32_t padding;
  union {
    int64_t number;
    double real;
    void *pointer;
  };
};

extern "C" int __tvm_ffi___tvm_set_device(void *, const Packed *, int32_t, Packed *result) {
  memset(result, 0, sizeof *result);
  return 0;
}
