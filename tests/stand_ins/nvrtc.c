// A libnvrtc of version MAJOR.MINOR that compiles nothing: its "CUBIN" is the options' architecture and the expression.
// An expression with "broken" in it does not compile, one with "invalid" has options that are refused.
// With EMULATED a kernel's lowered name is the one that the emulated driver (kernels/emu) has it under.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct program {
    char expression[256], architecture[64];
    int broken;
};
static const int architectures[] = {75, 80, 90};

int nvrtcVersion(int* major, int* minor) { return *major = MAJOR, *minor = MINOR, 0; }
int nvrtcGetNumSupportedArchs(int* count) { return *count = 3, 0; }
int nvrtcGetSupportedArchs(int* numbers) { return memcpy(numbers, architectures, sizeof architectures), 0; }
const char* nvrtcGetErrorString(int status) { return status == 5 ? "NVRTC_ERROR_INVALID_OPTION" : "NVRTC_ERROR"; }

int nvrtcCreateProgram(struct program** made, const char* source, const char* name, int count, const char* const* texts,
                       const char* const* names) {
    return *made = calloc(1, sizeof **made), 0;
}
int nvrtcDestroyProgram(struct program** gone) { return free(*gone), 0; }
int nvrtcAddNameExpression(struct program* p, const char* expression) {
    return snprintf(p->expression, sizeof p->expression, "%s", expression), 0;
}
int nvrtcCompileProgram(struct program* p, int count, const char* const* options) {
    snprintf(p->architecture, sizeof p->architecture, "%s", options[0]);
    if (strstr(p->expression, "invalid")) return 5;
    p->broken = strstr(p->expression, "broken") != NULL;
    return p->broken ? 6 : 0;
}

int nvrtcGetProgramLogSize(struct program* p, size_t* bytes) { return *bytes = 64, 0; }
int nvrtcGetProgramLog(struct program* p, char* log) {
    return snprintf(log, 64, "%s", p->broken ? "line 1: something is undefined\n" : "8 registers\n"), 0;
}
int nvrtcGetCUBINSize(struct program* p, size_t* bytes) { return *bytes = 512, 0; }
int nvrtcGetCUBIN(struct program* p, char* cubin) {
    memset(cubin, 0, 512);
    return snprintf(cubin, 512, "\177ELFfake %s %s", p->architecture, p->expression), 0;
}
#ifdef EMULATED
int nvrtcGetLoweredName(struct program* p, const char* expression, const char** name) {
    const char* (*mangled)(const char*) = dlsym(dlopen("libcuda.so.1", RTLD_NOW), "skvq_mangled");
    return *name = mangled(expression), 0;
}
#elif !defined(WITHOUT_LOWERED_NAME)
int nvrtcGetLoweredName(struct program* p, const char* expression, const char** name) { return *name = "lowered", 0; }
#endif
