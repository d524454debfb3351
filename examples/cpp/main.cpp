// Write a latent's bytes (float32, little-endian) to standard output: latents SEED NAME INDEX ELEMENTS
#include <cstdio>
#include <cstdlib>

#include "latents.hpp"

int main(int count, char** arguments) {
    if (count != 5) {
        std::fprintf(stderr, "usage: %s SEED NAME INDEX ELEMENTS\n", arguments[0]);
        return 2;
    }
    const auto number = [&](int k) { return std::strtoull(arguments[k], nullptr, 10); };
    const auto values = ganexport::normal_latent(number(1), arguments[2], number(3), number(4));
    return std::fwrite(values.data(), sizeof(float), values.size(), stdout) == values.size() ? 0 : 1;
}
