/* As much of CUDA's driver and runtime as TVM's CUDA runtime calls: one device whose memory is this process's and whose
 * kernels are functions of a library of this processor (EDGEWISE_EMULATED_KERNELS, made by cuda.py). */

#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { unsigned x, y, z; } Dimensions;
typedef struct { Dimensions grid, block; } Launch; /* how CUlaunchConfig begins */
typedef int (*Kernel)(Dimensions grid, Dimensions block, void **arguments);

#define NOTHING(name) int name(void) { return 0; }
NOTHING(cudaSetDevice) NOTHING(cudaGetLastError) NOTHING(cudaPeekAtLastError)
NOTHING(cudaStreamSynchronize) NOTHING(cudaStreamWaitEvent) NOTHING(cudaStreamDestroy)
NOTHING(cudaEventRecord) NOTHING(cudaEventSynchronize) NOTHING(cudaEventDestroy)
NOTHING(cudaStreamBeginCapture) NOTHING(cudaStreamEndCapture) NOTHING(cudaGraphInstantiate) NOTHING(cudaGraphLaunch)
NOTHING(cudaGraphDestroy) NOTHING(cudaGraphExecDestroy) NOTHING(cuModuleUnload) NOTHING(cuFuncSetAttribute)
NOTHING(cuTensorMapEncodeTiled) NOTHING(cudaMemcpyPeerAsync)

const char *cudaGetErrorString(int error) { return "emulated"; }
const char *cudaGetErrorName(int error) { return "emulated"; }
int cuGetErrorName(int error, const char **name) { return *name = "emulated", 0; }
int cuGetErrorString(int error, const char **name) { return *name = "emulated", 0; }
int cuDeviceGetName(char *name, int length, int device) { return snprintf(name, length, "emulated"), 0; }
int cudaGetDevice(int *device) { return *device = 0, 0; }
int cudaGetDeviceCount(int *count) { return *count = 1, 0; }
int cudaStreamCreate(void **stream) { return *stream = NULL, 0; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return *stream = NULL, 0; }
int cudaEventCreate(void **event) { return *event = NULL, 0; }
int cudaEventElapsedTime(float *ms, void *from, void *to) { return *ms = 1, 0; }

int cudaGetDeviceProperties(struct { char name[256], ids[28]; size_t memory_bytes; } *properties, int device) { /* how cudaDeviceProp begins */
  memset(properties, 0, sizeof *properties);
  strcpy(properties->name, "emulated");
  properties->memory_bytes = (size_t)1 << 30;
  return 0;
}

int cudaMemGetInfo(size_t *available, size_t *total) { return *available = *total = (size_t)1 << 30, 0; }
int cudaMalloc(void **memory, size_t bytes) { return *memory = aligned_alloc(256, (bytes + 256) & ~(size_t)255), *memory == NULL; }
int cudaMallocHost(void **memory, size_t bytes) { return cudaMalloc(memory, bytes); }
int cudaFree(void *memory) { return free(memory), 0; }
int cudaFreeHost(void *memory) { return free(memory), 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *stream) { return memcpy(to, from, bytes), 0; }

int cudaDeviceGetAttribute(int *value, int attribute, int device) { /* enum cudaDeviceAttr */
  *value = attribute == 75 ? 8 : attribute == 76 ? 7 : attribute == 1 ? 1024 : attribute == 10 ? 32 : 1;
  return 0;
}

/* As a real one, it takes compiled code alone. */
int cuModuleLoadData(void **module, const void *code) {
  *module = (void *)code;
  return memcmp(code, "\177ELF", 4) ? 200 : 0;
}

static int skip(Dimensions grid, Dimensions block, void **arguments) { return 0; }

int cuModuleGetFunction(void **function, void *module, const char *name) {
  static void *library;
  char symbol[256];
  if (!library && !(library = dlopen(getenv("EDGEWISE_EMULATED_KERNELS"), RTLD_NOW))) return 500;
  snprintf(symbol, sizeof symbol, "emulated_%s", name);
  *function = dlsym(library, symbol);
  if (!*function && strncmp(name, "kernel_", 7)) *function = skip; /* of the probe */
  return *function ? 0 : 500;
}

int cuLaunchKernelEx(const Launch *launch, void *function, void **arguments, void **extra) {
  return ((Kernel)function)(launch->grid, launch->block, arguments) ? 1 : 0;
}
