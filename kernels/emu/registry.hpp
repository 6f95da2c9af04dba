// Kernel instances compiled for the host, by the expression that names them and by their mangled name.
#pragma once
#include "emulator.hpp"

#include <map>
#include <string>

namespace emulator {

/// Runs one instance with a pointer to its parameter struct.
struct Instance {
    std::string mangled;
    size_t params_bytes;
    std::function<void(Index grid, Index block, size_t shared_bytes, const void* params)> run;
};

/// By expression, written as NVRTC's name expressions are.
std::map<std::string, Instance>& instances();
/// The one with this mangled name, as a module's function is asked for; null if there is none. g++ and NVRTC mangle alike.
const Instance* find_mangled(const std::string& name);
std::string mangled_name(void* function);

template <class Params>
bool add_instance(const char* expression, void (*kernel)(Params)) {
    auto run = [kernel](Index grid, Index block, size_t shared_bytes, const void* params) {
        Params copy;
        std::memcpy(&copy, params, sizeof copy);
        launch(grid, block, shared_bytes, [&] { kernel(copy); });
    };
    instances()[expression] = {mangled_name(reinterpret_cast<void*>(kernel)), sizeof(Params), run};
    return true;
}

}  // namespace emulator

#define SKVQ_JOIN_(a, b) a##b
#define SKVQ_JOIN(a, b) SKVQ_JOIN_(a, b)
/// INSTANCE(skvq::kernel<…>), one a line, in a table of instances.
#define INSTANCE(...) \
    static const bool SKVQ_JOIN(added_, __COUNTER__) = emulator::add_instance(#__VA_ARGS__, __VA_ARGS__);
