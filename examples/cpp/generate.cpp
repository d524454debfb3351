// One picture from an exported generator through ONNX Runtime's C API: generate MODEL.onnx SEED OUTPUT.ppm
// [LOW HIGH]
//
// The generator has one float32 input drawn from normal(0, 1) with the batch first, and one float32 output
// [batch, 1 or 3, height, width] whose values lie in [LOW, HIGH] (manifest.json says; -1 and 1 when not given).
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "latents.hpp"
#include "onnxruntime_c_api.h"

namespace {

const OrtApi* api = nullptr;

// Throws what a call of the API complains about.
void check(OrtStatus* status) {
    if (status == nullptr) return;
    const std::string message = api->GetErrorMessage(status);
    api->ReleaseStatus(status);
    throw std::runtime_error(message);
}

// An object of the API that releases itself.
template <typename T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

template <typename T, typename Make, typename... Arguments>
Owned<T> make(void (*release)(T*), Make create, Arguments... arguments) {
    T* object = nullptr;
    check(create(arguments..., &object));
    return {object, release};
}

struct Picture {
    std::int64_t channels, height, width;
    std::vector<float> values;  // [channels, height, width]
};

Picture run(const char* path, std::uint64_t seed) {
    const auto environment = make<OrtEnv>(api->ReleaseEnv, api->CreateEnv, ORT_LOGGING_LEVEL_ERROR, "ganexport");
    const auto options = make<OrtSessionOptions>(api->ReleaseSessionOptions, api->CreateSessionOptions);
    // int8 files: without this, products overflow on processors without VNNI. Others are not touched.
    check(api->AddSessionConfigEntry(options.get(), "session.x64quantprecision", "1"));
    const auto session = make<OrtSession>(api->ReleaseSession, api->CreateSession,
                                          static_cast<const OrtEnv*>(environment.get()), path,
                                          static_cast<const OrtSessionOptions*>(options.get()));
    const OrtSession* opened = session.get();
    OrtAllocator* allocator = nullptr;
    check(api->GetAllocatorWithDefaultOptions(&allocator));
    std::size_t inputs = 0;
    check(api->SessionGetInputCount(opened, &inputs));
    if (inputs != 1) throw std::runtime_error("this program feeds generators with one input");
    const auto name_of = [&](auto get) {
        char* name = nullptr;
        check(get(opened, std::size_t{0}, allocator, &name));
        std::string copy = name;
        check(api->AllocatorFree(allocator, name));
        return copy;
    };
    const std::string input = name_of(api->SessionGetInputName), output = name_of(api->SessionGetOutputName);

    // The input's shape, with a batch of one.
    const auto type = make<OrtTypeInfo>(api->ReleaseTypeInfo, api->SessionGetInputTypeInfo, opened, std::size_t{0});
    const OrtTensorTypeAndShapeInfo* declared = nullptr;  // belongs to `type`
    check(api->CastTypeInfoToTensorInfo(type.get(), &declared));
    std::size_t rank = 0;
    check(api->GetDimensionsCount(declared, &rank));
    std::vector<std::int64_t> shape(rank);
    check(api->GetDimensions(declared, shape.data(), rank));
    if (rank == 0) throw std::runtime_error("the input has no batch axis");
    shape[0] = 1;
    std::size_t elements = 1;
    for (const std::int64_t size : shape) {
        if (size < 1) throw std::runtime_error("the input has a free size besides the batch");
        elements *= static_cast<std::size_t>(size);
    }

    std::vector<float> latent = ganexport::normal_latent(seed, input, 0, elements);
    const auto memory = make<OrtMemoryInfo>(api->ReleaseMemoryInfo, api->CreateCpuMemoryInfo, OrtArenaAllocator,
                                            OrtMemTypeDefault);
    const auto fed = make<OrtValue>(api->ReleaseValue, api->CreateTensorWithDataAsOrtValue,
                                    static_cast<const OrtMemoryInfo*>(memory.get()),
                                    static_cast<void*>(latent.data()), latent.size() * sizeof(float),
                                    static_cast<const std::int64_t*>(shape.data()), shape.size(),
                                    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
    const char* const input_names[] = {input.c_str()};
    const char* const output_names[] = {output.c_str()};
    const OrtValue* const feeds[] = {fed.get()};
    OrtValue* fetched = nullptr;
    check(api->Run(session.get(), nullptr, input_names, feeds, 1, output_names, 1, &fetched));
    const Owned<OrtValue> image{fetched, api->ReleaseValue};

    const auto made = make<OrtTensorTypeAndShapeInfo>(api->ReleaseTensorTypeAndShapeInfo, api->GetTensorTypeAndShape,
                                                      static_cast<const OrtValue*>(image.get()));
    ONNXTensorElementDataType kind = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    check(api->GetTensorElementType(made.get(), &kind));
    check(api->GetDimensionsCount(made.get(), &rank));
    std::vector<std::int64_t> sizes(rank);
    check(api->GetDimensions(made.get(), sizes.data(), rank));
    if (kind != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || rank != 4 || sizes[0] != 1 || (sizes[1] != 1 && sizes[1] != 3))
        throw std::runtime_error("the output is not float32 [1, 1 or 3, height, width]");
    void* data = nullptr;
    check(api->GetTensorMutableData(image.get(), &data));
    const float* values = static_cast<const float*>(data);
    return {sizes[1], sizes[2], sizes[3], {values, values + sizes[1] * sizes[2] * sizes[3]}};
}

// Grey or colour, as the binary formats of Netpbm; values become bytes exactly as Generator.generate makes them.
void write(const Picture& picture, const char* path, double low, double high) {
    const float scale = static_cast<float>(255.0 / (high - low));
    const float offset = static_cast<float>(0.5 - low * (255.0 / (high - low)));
    const std::int64_t area = picture.height * picture.width;
    std::vector<unsigned char> bytes(picture.values.size());
    for (std::int64_t channel = 0; channel < picture.channels; ++channel)
        for (std::int64_t pixel = 0; pixel < area; ++pixel) {
            const float scaled = picture.values[channel * area + pixel] * scale;
            const float value = scaled + offset;
            if (std::isnan(value)) throw std::runtime_error("the engine made NaN");
            bytes[pixel * picture.channels + channel] = static_cast<unsigned char>(std::clamp(value, 0.0f, 255.0f));
        }
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file{std::fopen(path, "wb"), std::fclose};
    if (!file) throw std::runtime_error(std::string(path) + ": cannot be written");
    std::fprintf(file.get(), "P%d\n%lld %lld\n255\n", picture.channels == 1 ? 5 : 6,
                 static_cast<long long>(picture.width), static_cast<long long>(picture.height));
    if (std::fwrite(bytes.data(), 1, bytes.size(), file.get()) != bytes.size())
        throw std::runtime_error(std::string(path) + ": the disk is full");
}

}  // namespace

int main(int count, char** arguments) {
    if (count != 4 && count != 6) {
        std::fprintf(stderr, "usage: %s MODEL.onnx SEED OUTPUT.ppm [LOW HIGH]\n", arguments[0]);
        return 2;
    }
    try {
        api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
        if (api == nullptr) throw std::runtime_error("this ONNX Runtime is older than the header");
        const double low = count == 6 ? std::atof(arguments[4]) : -1.0, high = count == 6 ? std::atof(arguments[5]) : 1.0;
        if (!(low < high)) throw std::runtime_error("LOW must be below HIGH");
        write(run(arguments[1], std::strtoull(arguments[2], nullptr, 10)), arguments[3], low, high);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
    return 0;
}
