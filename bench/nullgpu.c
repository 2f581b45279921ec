// A GPU that computes nothing, which null_gpu.py builds and preloads: it stands in for the CUDA runtime and driver,
// cuBLAS and cuDNN. Its memory is the host's, kernels and products return at once and are counted; what they would have
// written is 0 or whatever lay there.
#define _GNU_SOURCE
#include <driver_types.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define OK(name) int name() { return 0; }
#define COUNTED(name, kind) int name() { return count(kind); }
#define MADE(name) int name(void **handle) { return made(handle); }  // handles of what is never looked into
#define MADE_SECOND(name) int name(void *context, void **handle) { return made(handle); }

enum { KERNELS, PRODUCTS, CUDNN, WAITS, KINDS };
long counts[KINDS];
#define MEMORY (80UL << 30)

static int count(int kind) {
  __sync_fetch_and_add(&counts[kind], 1);
  return 0;
}

static int made(void **handle) {
  static long last = 0x1000;
  *handle = (void *)__sync_add_and_fetch(&last, 16);
  return 0;
}

// ---------------------------------------------------------------- one device, as an H100 says it is
int cudaGetDeviceCount(int *number) {
  *number = 1;
  return 0;
}

int cudaGetDevice(int *number) {
  *number = 0;
  return 0;
}

int cudaGetDeviceProperties(struct cudaDeviceProp *about, int number) {
  memset(about, 0, sizeof *about);
  strcpy(about->name, "Null GPU");
  about->major = 9;
  about->multiProcessorCount = 132;
  about->totalGlobalMem = MEMORY;
  about->warpSize = 32;
  about->maxThreadsPerBlock = 1024;
  about->maxThreadsDim[0] = about->maxThreadsDim[1] = 1024;
  about->maxThreadsDim[2] = 64;
  about->maxGridSize[0] = 2147483647;
  about->maxGridSize[1] = about->maxGridSize[2] = 65535;
  about->sharedMemPerBlock = 49152;
  about->sharedMemPerBlockOptin = 232448;
  about->sharedMemPerMultiprocessor = 233472;
  about->regsPerBlock = about->regsPerMultiprocessor = 65536;
  about->maxThreadsPerMultiProcessor = 2048;
  about->maxBlocksPerMultiProcessor = 32;
  about->totalConstMem = 65536;
  about->l2CacheSize = 52428800;
  about->memoryBusWidth = 5120;
  about->concurrentKernels = about->unifiedAddressing = about->managedMemory = about->canMapHostMemory = 1;
  about->asyncEngineCount = 3;
  about->cooperativeLaunch = 1;
  about->textureAlignment = 512;
  return 0;
}

int cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int number) {
  struct cudaDeviceProp about;
  cudaGetDeviceProperties(&about, number);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = about.maxThreadsPerBlock; break;
    case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrMaxGridDimX: *value = about.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = about.maxGridSize[1]; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = about.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = about.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = about.sharedMemPerMultiprocessor; break;
    case cudaDevAttrMaxRegistersPerBlock: *value = about.regsPerBlock; break;
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = about.regsPerMultiprocessor; break;
    case cudaDevAttrWarpSize: *value = about.warpSize; break;
    case cudaDevAttrMultiProcessorCount: *value = about.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = about.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = about.maxBlocksPerMultiProcessor; break;
    case cudaDevAttrL2CacheSize: *value = about.l2CacheSize; break;
    case cudaDevAttrComputeCapabilityMajor: *value = about.major; break;
    default: *value = 0;
  }
  return 0;
}

int cudaDeviceCanAccessPeer(int *can, int one, int other) {
  *can = 0;
  return 0;
}

int cudaDeviceGetStreamPriorityRange(int *least, int *most) {
  *least = 0;
  *most = -5;
  return 0;
}

int cudaDriverGetVersion(int *version) {
  *version = 13000;
  return 0;
}

int cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }
const char *cudaGetErrorString(int error) { return "no error on the null GPU"; }
const char *cudaGetErrorName(int error) { return "cudaNullGpu"; }
OK(cudaSetDevice) OK(cudaGetLastError) OK(cudaPeekAtLastError) OK(cudaDeviceEnablePeerAccess) OK(cudaDeviceGetPCIBusId)

// ---------------------------------------------------------------- memory: pages that nobody has touched cost nothing
#define AREAS 65536
static struct {
  char *start;
  size_t size;
  enum cudaMemoryType kind;
} areas[AREAS];
static int areas_used;
static size_t reserved;
static pthread_mutex_t changing = PTHREAD_MUTEX_INITIALIZER;

static enum cudaMemoryType kind_of(const void *place) {
  for (int i = 0; i < areas_used; i++)
    if (areas[i].start && (size_t)((char *)place - areas[i].start) < areas[i].size) return areas[i].kind;
  return cudaMemoryTypeUnregistered;
}

static int take(void **place, size_t size, enum cudaMemoryType kind) {
  if (size == 0) size = 1;
  char *start = MAP_FAILED;
  if (kind != cudaMemoryTypeDevice || reserved + size <= MEMORY)
    start = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  *place = NULL;
  if (start == MAP_FAILED) return cudaErrorMemoryAllocation;
  pthread_mutex_lock(&changing);
  int i = 0;
  while (i < areas_used && areas[i].start) i++;
  if (i == areas_used) areas_used++;
  areas[i].size = size;
  areas[i].kind = kind;
  areas[i].start = start;
  if (kind == cudaMemoryTypeDevice) reserved += size;
  pthread_mutex_unlock(&changing);
  *place = start;
  return 0;
}

static int drop(void *place) {
  pthread_mutex_lock(&changing);
  for (int i = 0; i < areas_used; i++)
    if (place && areas[i].start == place) {
      munmap(place, areas[i].size);
      if (areas[i].kind == cudaMemoryTypeDevice) reserved -= areas[i].size;
      areas[i].start = NULL;
      break;
    }
  pthread_mutex_unlock(&changing);
  return 0;
}

int cudaMalloc(void **place, size_t size) { return take(place, size, cudaMemoryTypeDevice); }
int cudaHostAlloc(void **place, size_t size, unsigned flags) { return take(place, size, cudaMemoryTypeHost); }
int cudaFree(void *place) { return drop(place); }
int cudaFreeHost(void *place) { return drop(place); }
OK(cudaHostRegister) OK(cudaHostUnregister)

int cudaMemGetInfo(size_t *unused, size_t *all) {
  *all = MEMORY;
  *unused = MEMORY - reserved;
  return 0;
}

int cudaPointerGetAttributes(struct cudaPointerAttributes *about, const void *place) {
  memset(about, 0, sizeof *about);
  about->type = kind_of(place);
  about->devicePointer = about->hostPointer = (void *)place;
  return 0;
}

// Small things that are read back would have been written by a kernel: they are 0. What is large and stays on the
// device is not moved at all.
static int copy(void *to, const void *from, size_t size) {
  int is_there = kind_of(to) == cudaMemoryTypeDevice;
  int is_here = kind_of(from) != cudaMemoryTypeDevice;
  if (is_here || size > 4096 && !is_there || size < 65536 && is_there) memmove(to, from, size);
  else if (!is_there) memset(to, 0, size);
  return 0;
}

int cudaMemcpyAsync(void *to, const void *from, size_t size) { return copy(to, from, size); }

int cudaMemcpy(void *to, const void *from, size_t size) {
  count(WAITS);
  return copy(to, from, size);
}

int cudaMemset(void *place, int value, size_t size) {
  if (size < 1 << 20) memset(place, value, size);
  return 0;
}

int cudaMemsetAsync(void *place, int value, size_t size) { return cudaMemset(place, value, size); }
int cudaGetSymbolAddress(void **place, const void *symbol) { return take(place, 4096, cudaMemoryTypeDevice); }
OK(cudaMemcpyToSymbol)

// ---------------------------------------------------------------- streams and events
MADE(cudaStreamCreate) MADE(cudaStreamCreateWithFlags) MADE(cudaStreamCreateWithPriority)
MADE(cudaEventCreate) MADE(cudaEventCreateWithFlags)
OK(cudaStreamDestroy) OK(cudaStreamQuery) OK(cudaStreamWaitEvent) OK(cudaThreadExchangeStreamCaptureMode)
OK(cudaEventDestroy) OK(cudaEventRecord) OK(cudaEventRecordWithFlags) OK(cudaEventQuery)
COUNTED(cudaStreamSynchronize, WAITS) COUNTED(cudaDeviceSynchronize, WAITS) COUNTED(cudaEventSynchronize, WAITS)

int cudaStreamGetPriority(void *stream, int *priority) {
  *priority = 0;
  return 0;
}

int cudaStreamIsCapturing(void *stream, enum cudaStreamCaptureStatus *status) {
  *status = 0;
  return 0;
}

int cudaStreamGetCaptureInfo(void *stream, enum cudaStreamCaptureStatus *status) {
  *status = 0;
  return 0;
}

int cudaEventElapsedTime(float *milliseconds) {
  *milliseconds = 1;
  return 0;
}

// ---------------------------------------------------------------- kernels
void **__cudaRegisterFatBinary(void *binary) {
  static void *handle;
  return &handle;
}

OK(__cudaRegisterFatBinaryEnd) OK(__cudaUnregisterFatBinary) OK(__cudaInitModule) OK(__cudaRegisterVar)
OK(__cudaRegisterFunction) OK(__cudaPushCallConfiguration) OK(__cudaPopCallConfiguration)
OK(cudaFuncSetAttribute) OK(cudaKernelSetAttributeForDevice)
COUNTED(cudaLaunchKernel, KERNELS) COUNTED(__cudaLaunchKernel, KERNELS) COUNTED(cudaLaunchKernelExC, KERNELS)

int __cudaGetKernel(void **kernel, void *function) {
  *kernel = function;
  return 0;
}

int cudaFuncGetAttributes(struct cudaFuncAttributes *about, const void *function) {
  memset(about, 0, sizeof *about);
  about->maxThreadsPerBlock = 1024;
  about->numRegs = 64;
  about->ptxVersion = about->binaryVersion = 90;
  about->maxDynamicSharedSizeBytes = 232448;
  return 0;
}

int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) {
  *blocks = 2;
  return 0;
}

// ---------------------------------------------------------------- the driver
OK(cuInit) OK(cuCtxSetCurrent) OK(cuTensorMapEncodeTiled) OK(cuModuleLoad) OK(cuModuleLoadData) OK(cuModuleLoadDataEx)
OK(cuModuleUnload) OK(cuLinkCreate_v2) OK(cuLinkAddData_v2) OK(cuLinkComplete) OK(cuFuncSetAttribute)
OK(cuFuncSetCacheConfig) COUNTED(cuLaunchKernel, KERNELS) COUNTED(cuLaunchCooperativeKernel, KERNELS)
MADE(cuCtxGetCurrent) MADE(cuDevicePrimaryCtxRetain) MADE(cuModuleGetFunction)
int cuDriverGetVersion(int *version) { return cudaDriverGetVersion(version); }
int cuDeviceGet(int *device) { return cudaGetDevice(device); }
int cuDeviceGetCount(int *number) { return cudaGetDeviceCount(number); }
int cuDeviceGetAttribute(int *value, int attribute, int device) { return cudaDeviceGetAttribute(value, attribute, device); }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) {
  *blocks = 2;
  return 0;
}

int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *is_active) {
  *flags = 0;
  *is_active = 1;
  return 0;
}

int cuGetErrorString(int error, const char **text) {
  *text = "no error on the null GPU";
  return 0;
}

int cuPointerGetAttribute(void *value) {
  *(long *)value = 0;
  return 0;
}

int cuFuncGetAttribute(int *value) {
  *value = 64;
  return 0;
}

OK(nothing)

int cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags, int *result) {
  *function = nothing;
  if (!strcmp(name, "cuDevicePrimaryCtxGetState")) *function = cuDevicePrimaryCtxGetState;
  if (!strcmp(name, "cuGetErrorString")) *function = cuGetErrorString;
  if (result) *result = 0;
  return 0;
}

// ---------------------------------------------------------------- cuBLAS
MADE(cublasCreate_v2) MADE(cublasLtMatmulDescCreate) MADE(cublasLtMatmulPreferenceCreate) MADE(cublasLtMatrixLayoutCreate)
OK(cublasDestroy_v2) OK(cublasSetStream_v2) OK(cublasSetWorkspace_v2) OK(cublasSetMathMode) OK(cublasSetPointerMode_v2)
OK(cublasSetSmCountTarget) OK(cublasLtMatmulDescDestroy) OK(cublasLtMatmulDescSetAttribute)
OK(cublasLtMatmulPreferenceDestroy) OK(cublasLtMatmulPreferenceSetAttribute) OK(cublasLtMatrixLayoutDestroy)
OK(cublasLtMatrixLayoutSetAttribute)
COUNTED(cublasGemmEx, PRODUCTS) COUNTED(cublasSgemm_v2, PRODUCTS) COUNTED(cublasDgemm_v2, PRODUCTS)
COUNTED(cublasGemmStridedBatchedEx, PRODUCTS) COUNTED(cublasSgemmStridedBatched, PRODUCTS)
COUNTED(cublasSgemmEx, PRODUCTS) COUNTED(cublasSgemv_v2, PRODUCTS) COUNTED(cublasSdot_v2, PRODUCTS)
COUNTED(cublasDotEx, PRODUCTS) COUNTED(cublasLtMatmul, PRODUCTS)
size_t cublasLtGetVersion(void) { return 130101; }

int cublasGetMathMode(void *handle, int *mode) {
  *mode = 0;
  return 0;
}

int cublasGetPointerMode_v2(void *handle, int *mode) {
  *mode = 0;
  return 0;
}

int cublasLtMatmulAlgoGetHeuristic(void *handle, void *a, void *b, void *c, void *d, void *e, void *f, int asked,
                                   void *found, int *number) {
  memset(found, 0, 96);
  *number = 1;
  return 0;
}

// ---------------------------------------------------------------- cuDNN
MADE(cudnnCreate) MADE(cudnnCreateTensorDescriptor) MADE(cudnnCreateFilterDescriptor)
OK(cudnnSetStream) OK(cudnnDestroyTensorDescriptor) OK(cudnnSetTensorNdDescriptor) OK(cudnnDestroyFilterDescriptor)
OK(cudnnSetFilterNdDescriptor) OK(cudnnBackendSetAttribute) OK(cudnnBackendFinalize) OK(cudnnBackendInitialize)
OK(cudnnBackendDestroyDescriptor) MADE_SECOND(cudnnGetStream) MADE_SECOND(cudnnBackendCreateDescriptor)
COUNTED(cudnnBatchNormalizationForwardInference, CUDNN) COUNTED(cudnnBackendExecute, CUDNN)
const char *cudnnGetErrorString(int error) { return "no error on the null GPU"; }

void cudnnGetLastErrorString(char *text, size_t size) {
  if (size) *text = 0;
}

int cudnnBackendGetAttribute(void *descriptor, int name, int type, int64_t asked, int64_t *number, void *out) {
  enum { HEURISTIC_RESULTS = 202, INTEGER = 3, DESCRIPTOR = 15 };
  int is_one = type == INTEGER && asked > 0 || type == DESCRIPTOR && asked == 1 && out;
  if (name != HEURISTIC_RESULTS && type == INTEGER && out && asked > 0) *(int64_t *)out = 0;
  if (number) *number = name == HEURISTIC_RESULTS || is_one;
  return 0;
}
