// Every instance of a table behind C functions: by expression for tests that call kernels through ctypes, by mangled name for drivers.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "registry.hpp"

#include <cstdio>
#include <dlfcn.h>

namespace emulator {
std::map<std::string, Instance>& instances() {
    static std::map<std::string, Instance> all;
    return all;
}
const Instance* find_mangled(const std::string& name) {
    for (const auto& [expression, instance] : instances())
        if (instance.mangled == name) return &instance;
    return nullptr;
}
std::string mangled_name(void* function) {
    Dl_info info{};
    return dladdr(function, &info) && info.dli_sname ? info.dli_sname : "";
}
}  // namespace emulator

/// 0, or 1 and a message. `params_bytes` must be the size of the instance's struct.
extern "C" int skvq_launch(const char* expression, const unsigned* grid, const unsigned* block, size_t shared_bytes, const void* params,
                           size_t params_bytes, char* message, size_t message_bytes) {
    try {
        auto found = emulator::instances().find(expression);
        if (found == emulator::instances().end()) throw emulator::Error(std::string("no instance ") + expression);
        if (found->second.params_bytes != params_bytes) {
            throw emulator::Error("parameters of " + std::to_string(found->second.params_bytes) + " bytes expected, not " +
                                  std::to_string(params_bytes));
        }
        found->second.run({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared_bytes, params);
        return 0;
    } catch (const std::exception& error) {
        std::snprintf(message, message_bytes, "%s", error.what());
        return 1;
    }
}

/// The mangled name of an expression, empty if there is no such instance.
extern "C" const char* skvq_mangled(const char* expression) {
    auto found = emulator::instances().find(expression);
    return found == emulator::instances().end() ? "" : found->second.mangled.c_str();
}

/// A launch as a driver sees it: CUDA's status. `early`: it may begin before those in front of it are done.
extern "C" int run_emulated(const char* function, const unsigned* grid, const unsigned* block, unsigned shared_bytes, const void* params, bool early) {
    constexpr int success = 0, not_found = 500, launch_failed = 719;
    const emulator::Instance* instance = emulator::find_mangled(function);
    if (!instance) {
        std::fprintf(stderr, "emulated driver: no instance %s\n", function);
        return not_found;
    }
    try {
        emulator::launches_begin_early = early;
        instance->run({grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared_bytes, params);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "emulated driver: %s\n", error.what());
        return launch_failed;
    }
    return success;
}
