// A libcuda.so.1 for machines without a GPU: device memory is the host's, a launch runs the host's instance of the same mangled name.
//
// Is: what loaders, streams, events and copies of a backend need, so that its real launch code runs; capture of a stream's launches, copies and
// fills into a graph, which replays them with the parameters that they had. Is not: asynchronous (every call is done when it returns), nor a
// check of a CUBIN beyond its first bytes. Instances are those of the table in EMULATED_INSTANCES.
// FAKE_CUDA_DEVICES: how many (1). FAKE_CUDA_CAPABILITY: 90. FAKE_CUDA_MULTIPROCESSORS: 108. FAKE_CUDA_RESIDENT: blocks that share one, 4. FAKE_CUDA_LOG: launches and waits are told on stderr.
#ifndef EMULATED_INSTANCES
#define EMULATED_INSTANCES "instances.hpp"
#endif
#include EMULATED_INSTANCES

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <vector>

#include "registry.hpp"

extern "C" int run_emulated(const char* function, const unsigned* grid, const unsigned* block, unsigned shared_bytes, const void* params,
                            bool early);

namespace {
enum Status { success = 0, invalid_value = 1, no_device = 100, invalid_device = 101, invalid_image = 200, not_found = 500, not_while_capturing = 900 };
using Handle = void*;
using Address = unsigned long long;

thread_local Handle current_context = nullptr;
char contexts[16];

int setting(const char* name, int otherwise) {
    const char* text = std::getenv(name);
    return text ? std::atoi(text) : otherwise;
}
int device_count() { return setting("FAKE_CUDA_DEVICES", 1); }

int copy(Address to, Address from, size_t bytes) {
    std::memmove(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes);
    return success;
}
/// As the driver's, at a multiple of 256 bytes; what nobody has written is not a number.
int allocate(Address* address, size_t bytes) {
    if (bytes == 0) return invalid_value;
    void* memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!memory) return 2;
    std::memset(memory, 0xff, bytes);
    *address = reinterpret_cast<Address>(memory);
    return success;
}
int release(Address address) {
    std::free(reinterpret_cast<void*>(address));
    return success;
}
int fill(Address to, unsigned char value, size_t count) {
    std::memset(reinterpret_cast<void*>(to), value, count);
    return success;
}
/// What a stream was given while it was captured; replayed in order.
struct Graph {
    std::vector<std::function<int()>> nodes;
};
std::map<Handle, Graph*> captures;

/// Runs work, or records it where its stream is being captured.
int put(Handle stream, std::function<int()> work) {
    const auto found = captures.find(stream);
    if (found == captures.end()) return work();
    found->second->nodes.push_back(std::move(work));
    return success;
}
double now() { return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count(); }
struct Event {
    double time = 0.0;
};
}  // namespace

#define DRIVER extern "C" __attribute__((visibility("default"))) int

// NVRTC asks for a table of the driver's and reads its first entry, the size in bytes, without a look at the result.
DRIVER cuGetExportTable(const void** table, const void*) {
    static const size_t empty[8] = {sizeof(size_t)};
    *table = empty;
    return success;
}
DRIVER cuInit(unsigned) { return device_count() ? success : no_device; }
DRIVER cuDriverGetVersion(int* version) { return *version = setting("FAKE_CUDA_VERSION", 13000), success; }
DRIVER cuGetErrorName(int status, const char** name) {
    *name = status == success ? "CUDA_SUCCESS" : status == not_found ? "CUDA_ERROR_NOT_FOUND" : status == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : "CUDA_ERROR";
    return success;
}
DRIVER cuGetErrorString(int, const char** text) { return *text = "an answer of the emulated driver", success; }

DRIVER cuDeviceGetCount(int* count) { return *count = device_count(), success; }
DRIVER cuDeviceGet(int* device, int index) { return *device = index, index < 0 || index >= device_count() ? invalid_device : success; }
DRIVER cuDeviceGetName(char* name, int bytes, int device) { return std::snprintf(name, bytes, "Emulated %d", device), success; }
DRIVER cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = 1ull << 33, success; }
DRIVER cuDeviceGetUuid_v2(char* uuid, int device) { return std::memset(uuid, device, 16), success; }
DRIVER cuDeviceGetAttribute(int* value, int attribute, int) {
    const int capability = setting("FAKE_CUDA_CAPABILITY", 90);
    switch (attribute) {
        case 1: *value = 1024; break;     // threads of a block
        case 8: *value = 49152; break;    // shared memory of a block
        case 10: *value = 32; break;      // lanes of a warp
        case 16: *value = setting("FAKE_CUDA_MULTIPROCESSORS", 108); break;
        case 38: *value = 40 << 20; break;  // second-level cache
        case 75: *value = capability / 10; break;
        case 76: *value = capability % 10; break;
        case 97: *value = 166912; break;  // shared memory a block may ask for
        case 115: *value = 1; break;      // memory pools
        default: *value = 0;
    }
    return success;
}
DRIVER cuMemGetInfo_v2(size_t* free, size_t* total) { return *free = *total = 1ull << 33, success; }

DRIVER cuDevicePrimaryCtxRetain(Handle* context, int device) { return *context = contexts + device, success; }
DRIVER cuDevicePrimaryCtxRelease_v2(int) { return success; }
DRIVER cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) { return *flags = 0, *active = 1, success; }
DRIVER cuCtxGetCurrent(Handle* context) { return *context = current_context, success; }
DRIVER cuCtxSetCurrent(Handle context) { return current_context = context, success; }
DRIVER cuCtxGetDevice(int* device) {
    if (!current_context) return 201;
    return *device = static_cast<int>(static_cast<char*>(current_context) - contexts), success;
}
DRIVER cuCtxSynchronize() { return success; }

DRIVER cuModuleLoadData(Handle* module, const void* image) {
    if (std::memcmp(image, "\x7f" "ELF", 4) != 0) return invalid_image;
    return *module = new char, success;
}
DRIVER cuModuleLoadDataEx(Handle* module, const void* image, unsigned, void*, void*) { return cuModuleLoadData(module, image); }
DRIVER cuModuleUnload(Handle module) { return delete static_cast<char*>(module), success; }
DRIVER cuModuleGetFunction(Handle* function, Handle, const char* name) {
    const emulator::Instance* instance = emulator::find_mangled(name);
    if (!instance) std::fprintf(stderr, "emulated driver: no instance %s\n", name);
    return *function = const_cast<emulator::Instance*>(instance), instance ? success : not_found;
}
DRIVER cuFuncSetAttribute(Handle, int, int) { return success; }
DRIVER cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Handle, int, size_t) { return *blocks = setting("FAKE_CUDA_RESIDENT", 4), success; }
DRIVER cuFuncGetAttribute(int* value, int, Handle) { return *value = 0, success; }
/// CUlaunchConfig of cuda.h, and its attributes, of which the one that counts lets a launch begin early.
struct LaunchAttribute {
    int id, padding, value[16];
};
struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    Handle stream;
    const LaunchAttribute* attributes;
    unsigned attribute_count;
};
DRIVER cuLaunchKernelEx(const LaunchConfig* config, Handle function, void** params, void**) {
    constexpr int programmatic_stream_serialization = 6;
    const auto& instance = *static_cast<emulator::Instance*>(function);
    const LaunchConfig launch = *config;
    const unsigned* block = launch.block;
    bool early = false;
    for (unsigned i = 0; i < launch.attribute_count; ++i) {
        if (launch.attributes[i].id != programmatic_stream_serialization) return invalid_value;
        early = launch.attributes[i].value[0] != 0;
    }
    if (std::getenv("FAKE_CUDA_LOG")) {
        std::fprintf(stderr, "launch %s grid %u,%u,%u block %u%s stream %p\n", instance.mangled.c_str(), launch.grid[0], launch.grid[1], launch.grid[2],
                     block[0] * block[1] * block[2], early ? " early" : "", launch.stream);
    }
    if (!launch.grid[0] || !launch.grid[1] || !launch.grid[2] || block[0] * block[1] * block[2] > 1024) return invalid_value;
    if (captures.empty()) return run_emulated(instance.mangled.c_str(), launch.grid, launch.block, launch.shared_bytes, params[0], early);
    // A graph has its own copy of the parameters.
    const char* bytes = static_cast<const char*>(params[0]);
    std::vector<char> kept(bytes, bytes + instance.params_bytes);
    return put(launch.stream, [=, &instance] {
        return run_emulated(instance.mangled.c_str(), launch.grid, launch.block, launch.shared_bytes, kept.data(), early);
    });
}

DRIVER cuMemAlloc_v2(Address* address, size_t bytes) { return allocate(address, bytes); }
DRIVER cuMemAllocAsync(Address* address, size_t bytes, Handle) { return allocate(address, bytes); }
DRIVER cuMemFree_v2(Address address) { return release(address); }
DRIVER cuMemFreeAsync(Address address, Handle) { return release(address); }
DRIVER cuMemcpy(Address to, Address from, size_t bytes) { return copy(to, from, bytes); }
DRIVER cuMemcpyAsync(Address to, Address from, size_t bytes, Handle stream) {
    return put(stream, [=] { return copy(to, from, bytes); });
}
DRIVER cuMemcpyHtoD_v2(Address to, const void* from, size_t bytes) { return copy(to, reinterpret_cast<Address>(from), bytes); }
DRIVER cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, Handle) { return copy(to, reinterpret_cast<Address>(from), bytes); }
DRIVER cuMemcpyDtoH_v2(void* to, Address from, size_t bytes) { return copy(reinterpret_cast<Address>(to), from, bytes); }
DRIVER cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, Handle) { return copy(reinterpret_cast<Address>(to), from, bytes); }
DRIVER cuMemcpyDtoD_v2(Address to, Address from, size_t bytes) { return copy(to, from, bytes); }
DRIVER cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, Handle) { return copy(to, from, bytes); }
DRIVER cuMemsetD8_v2(Address to, unsigned char value, size_t count) { return fill(to, value, count); }
DRIVER cuMemsetD8Async(Address to, unsigned char value, size_t count, Handle stream) {
    return put(stream, [=] { return fill(to, value, count); });
}

DRIVER cuStreamCreate(Handle* stream, unsigned) { return *stream = new char, success; }
DRIVER cuStreamDestroy_v2(Handle stream) { return delete static_cast<char*>(stream), success; }
DRIVER cuStreamSynchronize(Handle stream) {
    if (std::getenv("FAKE_CUDA_LOG")) std::fprintf(stderr, "synchronize stream %p\n", stream);
    return captures.count(stream) ? not_while_capturing : success;
}
DRIVER cuStreamQuery(Handle) { return success; }
DRIVER cuStreamWaitEvent(Handle, Handle, unsigned) { return success; }
DRIVER cuStreamIsCapturing(Handle stream, int* capturing) { return *capturing = captures.count(stream) ? 1 : 0, success; }
DRIVER cuStreamBeginCapture_v2(Handle stream, int) {
    if (captures.count(stream)) return not_while_capturing;
    return captures[stream] = new Graph, success;
}
DRIVER cuStreamEndCapture(Handle stream, Handle* graph) {
    const auto found = captures.find(stream);
    if (found == captures.end()) return invalid_value;
    *graph = found->second;
    captures.erase(found);
    return success;
}
/// An executable graph is the graph itself.
DRIVER cuGraphInstantiateWithFlags(Handle* executable, Handle graph, unsigned long long) { return *executable = graph, success; }
DRIVER cuGraphLaunch(Handle executable, Handle stream) {
    for (const auto& node : static_cast<Graph*>(executable)->nodes) {
        if (const int status = put(stream, node)) return status;
    }
    return success;
}
DRIVER cuGraphExecDestroy(Handle) { return success; }
DRIVER cuGraphDestroy(Handle graph) { return delete static_cast<Graph*>(graph), success; }
DRIVER cuEventCreate(Handle* event, unsigned) { return *event = new Event, success; }
DRIVER cuEventDestroy_v2(Handle event) { return delete static_cast<Event*>(event), success; }
DRIVER cuEventRecord(Handle event, Handle) { return static_cast<Event*>(event)->time = now(), success; }
DRIVER cuEventSynchronize(Handle) { return success; }
DRIVER cuEventQuery(Handle) { return success; }
DRIVER cuEventElapsedTime_v2(float* milliseconds, Handle from, Handle to) {
    *milliseconds = static_cast<float>(static_cast<Event*>(to)->time - static_cast<Event*>(from)->time);
    return success;
}
