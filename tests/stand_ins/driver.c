// A libcuda.so.1 that tells on stderr what it is asked, a line a call. Its memory is the host's; it runs nothing.
// Answers come from the environment: FAKE_INIT (status of cuInit), FAKE_VERSION, FAKE_DEVICES (how many), FAKE_CAPABILITY (such as 90),
// FAKE_LOAD and FAKE_LAUNCH (status). -DWITHOUT_COPY and -DWITHOUT_SYNCHRONIZE leave functions out.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static _Thread_local size_t current;

static int number(const char* name, int otherwise) {
    const char* text = getenv(name);
    return text ? atoi(text) : otherwise;
}

int cuInit(unsigned flags) { return number("FAKE_INIT", 0); }
int cuDriverGetVersion(int* version) { return *version = number("FAKE_VERSION", 12040), 0; }

// A real driver knows more: an unknown status has neither name nor text.
int cuGetErrorName(int status, const char** name) {
    *name = status == 209 ? "CUDA_ERROR_NO_BINARY_FOR_GPU" : NULL;
    return *name ? 0 : 1;
}
int cuGetErrorString(int status, const char** text) {
    *text = status == 209 ? "no kernel image" : NULL;
    return *text ? 0 : 1;
}

int cuDeviceGetCount(int* count) { return *count = number("FAKE_DEVICES", 2), 0; }
int cuDeviceGet(int* device, int index) { return *device = index, 0; }
int cuDeviceGetName(char* name, int bytes, int device) { return snprintf(name, bytes, "Fake %d", device), 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    const int capability = number("FAKE_CAPABILITY", 90);
    switch (attribute) {
        case 75: *value = capability / 10; return 0;
        case 76: *value = capability % 10; return 0;
        case 16: *value = 132; return 0;     // multiprocessors
        case 97: *value = 232448; return 0;  // shared memory a block may ask for
        case 38: *value = 1 << 20; return 0; // second-level cache
    }
    return 1;
}

int cuDevicePrimaryCtxRetain(size_t* context, int device) {
    fprintf(stderr, "retain %d\n", device);
    return *context = 100 + device, 0;
}
int cuCtxGetCurrent(size_t* context) { return *context = current, 0; }
int cuCtxSetCurrent(size_t context) {
    fprintf(stderr, "context %zu\n", context);
    return current = context, 0;
}

int cuModuleLoadData(size_t* module, const void* image) {
    fprintf(stderr, "load %.4s\n", (const char*)image + 4);
    return *module = 7, number("FAKE_LOAD", 0);
}
int cuModuleGetFunction(const char** function, size_t module, const char* name) { return *function = strdup(name), 0; }
int cuFuncSetAttribute(const char* function, int attribute, int value) {
    fprintf(stderr, "attribute %d %d\n", attribute, value);
    return 0;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const char* function, int threads, size_t shared) { return *blocks = 4, 0; }
typedef struct {
    int id, padding, value[16];
} Attribute;
typedef struct {
    unsigned grid[3], block[3], shared;
    size_t stream;
    const Attribute* attributes;
    unsigned count;
} Config;
int cuLaunchKernelEx(const Config* config, const char* function, void** parameters, void** extra) {
    const unsigned *g = config->grid, *b = config->block;
    long long first;
    memcpy(&first, parameters[0], sizeof first);
    // One call for a line, which other threads write too.
    char early[40] = "";
    if (config->count) snprintf(early, sizeof early, " attribute %d: %d", config->attributes[0].id, config->attributes[0].value[0]);
    fprintf(stderr, "launch %s %u,%u,%u %u,%u,%u shared %u stream %zu context %zu: %lld%s\n", function, g[0], g[1], g[2], b[0], b[1], b[2],
            config->shared, config->stream, current, first, early);
    return number("FAKE_LAUNCH", 0);
}

#ifndef WITHOUT_COPY
int cuMemcpyAsync(size_t to, size_t from, size_t bytes, size_t stream) { return memcpy((void*)to, (void*)from, bytes), 0; }
#endif
int cuMemsetD8Async(size_t to, unsigned char value, size_t bytes, size_t stream) { return memset((void*)to, value, bytes), 0; }
#ifndef WITHOUT_SYNCHRONIZE
int cuStreamSynchronize(size_t stream) { return 0; }
#endif
