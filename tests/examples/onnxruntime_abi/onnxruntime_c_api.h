// The part of ONNX Runtime's C interface that examples/cpp/generate.cpp calls, for machines that have the library (the
// Python package brings it) and not its headers. Not for users: the releases hold the real header.
//
// The interface is a table of function pointers whose order never changes; slots that are not called are only counted.
#pragma once
#include <cstddef>
#include <cstdint>

#define ORT_API_VERSION 11  // old enough for every library of the last years

struct OrtStatus;
struct OrtEnv;
struct OrtSession;
struct OrtSessionOptions;
struct OrtRunOptions;
struct OrtValue;
struct OrtTypeInfo;
struct OrtTensorTypeAndShapeInfo;
struct OrtMemoryInfo;
struct OrtAllocator;

enum OrtLoggingLevel { ORT_LOGGING_LEVEL_ERROR = 3 };
enum OrtAllocatorType { OrtArenaAllocator = 1 };
enum OrtMemType { OrtMemTypeDefault = 0 };
enum ONNXTensorElementDataType { ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED = 0, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1 };

struct OrtApi {
    void* unused_0[2];
    const char* (*GetErrorMessage)(const OrtStatus*);  // slot 2
    OrtStatus* (*CreateEnv)(OrtLoggingLevel, const char*, OrtEnv**);
    void* unused_4[3];
    OrtStatus* (*CreateSession)(const OrtEnv*, const char*, const OrtSessionOptions*, OrtSession**);  // 7
    void* unused_8[1];
    OrtStatus* (*Run)(OrtSession*, const OrtRunOptions*, const char* const*, const OrtValue* const*, std::size_t,
                      const char* const*, std::size_t, OrtValue**);
    OrtStatus* (*CreateSessionOptions)(OrtSessionOptions**);  // 10
    void* unused_11[19];
    OrtStatus* (*SessionGetInputCount)(const OrtSession*, std::size_t*);  // 30
    void* unused_31[2];
    OrtStatus* (*SessionGetInputTypeInfo)(const OrtSession*, std::size_t, OrtTypeInfo**);  // 33
    void* unused_34[2];
    OrtStatus* (*SessionGetInputName)(const OrtSession*, std::size_t, OrtAllocator*, char**);  // 36
    OrtStatus* (*SessionGetOutputName)(const OrtSession*, std::size_t, OrtAllocator*, char**);
    void* unused_38[11];
    OrtStatus* (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo*, void*, std::size_t, const std::int64_t*,
                                                 std::size_t, ONNXTensorElementDataType, OrtValue**);  // 49
    void* unused_50[1];
    OrtStatus* (*GetTensorMutableData)(OrtValue*, void**);  // 51
    void* unused_52[3];
    OrtStatus* (*CastTypeInfoToTensorInfo)(const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo**);  // 55
    void* unused_56[4];
    OrtStatus* (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo*, ONNXTensorElementDataType*);  // 60
    OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo*, std::size_t*);
    OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo*, std::int64_t*, std::size_t);
    void* unused_63[2];
    OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo**);  // 65
    void* unused_66[3];
    OrtStatus* (*CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo**);  // 69
    void* unused_70[6];
    OrtStatus* (*AllocatorFree)(OrtAllocator*, void*);  // 76
    void* unused_77[1];
    OrtStatus* (*GetAllocatorWithDefaultOptions)(OrtAllocator**);  // 78
    void* unused_79[13];
    void (*ReleaseEnv)(OrtEnv*);  // 92
    void (*ReleaseStatus)(OrtStatus*);
    void (*ReleaseMemoryInfo)(OrtMemoryInfo*);
    void (*ReleaseSession)(OrtSession*);
    void (*ReleaseValue)(OrtValue*);
    void (*ReleaseRunOptions)(OrtRunOptions*);
    void (*ReleaseTypeInfo)(OrtTypeInfo*);
    void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*);
    void (*ReleaseSessionOptions)(OrtSessionOptions*);  // 100
    void* unused_101[29];
    OrtStatus* (*AddSessionConfigEntry)(OrtSessionOptions*, const char*, const char*);  // 130
};
static_assert(offsetof(OrtApi, AddSessionConfigEntry) == 130 * sizeof(void*), "a slot was miscounted");

struct OrtApiBase {
    const OrtApi* (*GetApi)(std::uint32_t);
    const char* (*GetVersionString)();
};

extern "C" const OrtApiBase* OrtGetApiBase();
