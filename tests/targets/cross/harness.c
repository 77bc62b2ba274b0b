/* Runs compiled kernels on a processor that has nothing else: no C library, no TVM runtime.

   Standard input is a file opened for reading and writing, of 8-byte words and then data:

     size of the file in bytes
     number of tensors; for each: DLPack's dtype as (code | bits << 8), offset of its data, rank, shape
     number of calls;   for each: index in KERNELS, number of arguments; for each: its kind, a tensor's index or a number

   The file is mapped, the calls are made in order, and what they write is in the file when the process ends with
   status 0. KERNELS is a list of K(symbol), given when this is compiled. */

#include <stddef.h>
#include <stdint.h>

enum { MOST_ARGUMENTS = 64, MOST_RANK = 8, TASKS = 3, TENSOR_ARGUMENT = 7, WORKSPACE_BYTES = 32 << 20 };

typedef struct { int32_t type, id; } Device;
typedef struct { uint8_t code, bits; uint16_t lanes; } Dtype;
typedef struct {
  void *data;
  Device device;
  int32_t rank;
  Dtype dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} Tensor; /* DLPack's DLTensor */
typedef struct {
  int32_t kind;
  uint32_t padding;
  union { int64_t word; void *pointer; } value;
} Argument; /* TVM FFI's TVMFFIAny */
typedef int (*Kernel)(void *, const Argument *, int32_t, Argument *);
typedef struct { void *sync; int32_t tasks; } Group;
typedef int (*Task)(int, Group *, void *);

#define K(symbol) extern int __tvm_ffi_##symbol(void *, const Argument *, int32_t, Argument *);
KERNELS
#undef K
#define K(symbol) __tvm_ffi_##symbol,
static const Kernel kernels[] = {KERNELS};

/* ---- Linux -------------------------------------------------------------------------------------- */

#if defined(__aarch64__)
enum { WRITE = 64, EXIT = 93, MAP = 222 };
#define TRAP "svc 0"
#define IN(i) __asm__("x" #i)
#define NUMBER __asm__("x8")
#elif defined(__riscv)
enum { WRITE = 64, EXIT = 93, MAP = 222 };
#define TRAP "ecall"
#define IN(i) __asm__("a" #i)
#define NUMBER __asm__("a7")
#elif defined(__arm__)
enum { WRITE = 4, EXIT = 1, MAP = 192 };
#define TRAP "svc 0"
#define IN(i) __asm__("r" #i)
#define NUMBER __asm__("r7")
#else
#error "no system calls are known for this processor"
#endif

static long linux_call(long number, long a, long b, long c, long d, long e, long f) {
  register long n NUMBER = number;
  register long r0 IN(0) = a;
  register long r1 IN(1) = b;
  register long r2 IN(2) = c;
  register long r3 IN(3) = d;
  register long r4 IN(4) = e;
  register long r5 IN(5) = f;
  __asm__ volatile(TRAP : "+r"(r0) : "r"(n), "r"(r1), "r"(r2), "r"(r3), "r"(r4), "r"(r5) : "memory");
  return r0;
}

static _Noreturn void stop(const char *reason) {
  long length = 0;
  while (reason[length]) ++length;
  linux_call(WRITE, 2, (long)reason, length, 0, 0, 0);
  for (;;) linux_call(EXIT, length > 0, 0, 0, 0, 0, 0);
}

static void *map_input(long bytes) {
  const long read_write = 3, shared = 1, standard_input = 0;
  void *found = (void *)linux_call(MAP, 0, bytes, read_write, shared, standard_input, 0);
  if ((uintptr_t)found >= (uintptr_t)-4095) stop("standard input cannot be mapped\n");
  return found;
}

/* What a compiler may call even without a library. */
void *memset(void *to, int value, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) ((unsigned char *)to)[i] = (unsigned char)value;
  return to;
}

void *memcpy(void *restrict to, const void *restrict from, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) ((unsigned char *)to)[i] = ((const unsigned char *)from)[i];
  return to;
}

/* ---- What TVM's runtime gives to kernels ------------------------------------------------------------ */

static _Alignas(64) unsigned char workspace[WORKSPACE_BYTES];
static size_t workspace_used;

static void *allocate(int device, int id, uint64_t bytes, int code, int bits) {
  unsigned char *found = workspace + workspace_used;
  (void)device, (void)id, (void)code, (void)bits;
  if (bytes > WORKSPACE_BYTES - workspace_used) stop("a kernel wants more workspace than there is\n");
  workspace_used += ((size_t)bytes + 63) / 64 * 64;
  return memset(found, 0xFF, (size_t)bytes); /* not a number, so that what is read before it is written shows */
}

static int release(int device, int id, void *pointer) {
  (void)device, (void)id, (void)pointer;
  return 0; /* all of it is free again after the call */
}

static int launch(Task task, void *data, int tasks) {
  Group group = {0, tasks > 0 ? tasks : TASKS};
  for (int i = 0; i < group.tasks; ++i) {
    int status = task(i, &group, data);
    if (status) return status;
  }
  return 0;
}

static int barrier(int task, Group *group) {
  (void)task, (void)group;
  stop("a kernel waits for its other tasks, which run one after the other here\n");
}

/* Every object file asks for these through pointers that a runtime sets when it loads a library. */
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = allocate;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = release;
int (*__TVMBackendParallelLaunch)(Task, void *, int) = launch;
int (*__TVMBackendParallelBarrier)(int, Group *) = barrier;

/* ---- The calls ------------------------------------------------------------------------------------ */

static Tensor tensors[1024];
static int64_t strides[1024][MOST_RANK];

static int64_t *read_tensors(int64_t *word, unsigned char *file) {
  int64_t count = *word++;
  if (count > 1024) stop("more tensors than there is room for\n");
  for (int64_t i = 0; i < count; ++i) {
    Tensor *t = &tensors[i];
    t->dtype = (Dtype){(uint8_t)word[0], (uint8_t)(word[0] >> 8), 1};
    t->data = file + word[1];
    t->device = (Device){1, 0};
    t->rank = (int32_t)word[2];
    t->shape = word + 3;
    t->strides = strides[i];
    if (t->rank > MOST_RANK) stop("a tensor has more axes than there is room for\n");
    int64_t stride = 1;
    for (int axis = t->rank - 1; axis >= 0; --axis) {
      strides[i][axis] = stride;
      stride *= t->shape[axis];
    }
    word += 3 + t->rank;
  }
  return word;
}

void _start(void) {
  int64_t *word = map_input(8);
  unsigned char *file = map_input((long)*word);
  word = read_tensors((int64_t *)file + 1, file);
  for (int64_t calls = *word++; calls > 0; --calls) {
    Argument arguments[MOST_ARGUMENTS], result = {0};
    Kernel kernel = kernels[*word++];
    int64_t count = *word++;
    if (count > MOST_ARGUMENTS) stop("a call has more arguments than there is room for\n");
    for (int64_t i = 0; i < count; ++i) {
      arguments[i] = (Argument){.kind = (int32_t)word[0]};
      if (word[0] == TENSOR_ARGUMENT)
        arguments[i].value.pointer = &tensors[word[1]];
      else
        arguments[i].value.word = word[1];
      word += 2;
    }
    workspace_used = 0;
    if (kernel(0, arguments, (int32_t)count, &result)) stop("a kernel returned an error\n");
  }
  stop("");
}
