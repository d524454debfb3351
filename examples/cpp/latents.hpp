// The seed contract (docs/seed-contract.md) in C++17: normal latents, the same bits as Python's.
// Compile with -ffp-contract=off: every operation must round on its own.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string_view>
#include <vector>

namespace ganexport {

// 32-bit FNV-1a of an input's name: its stream of random words.
inline std::uint32_t stream_of(std::string_view name) {
    std::uint32_t value = 0x811C9DC5u;
    for (unsigned char byte : name) value = (value ^ byte) * 0x01000193u;
    return value;
}

// Word `element` of sample `index`: Philox4x32-10 (Salmon et al., SC 2011).
inline void philox(std::uint64_t seed, std::uint32_t stream, std::uint64_t index, std::uint32_t block,
                   std::uint32_t out[4]) {
    std::uint32_t c[4] = {block, stream, static_cast<std::uint32_t>(index), static_cast<std::uint32_t>(index >> 32)};
    std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t p0 = std::uint64_t{0xD2511F53u} * c[0], p2 = std::uint64_t{0xCD9E8D57u} * c[2];
        const std::uint32_t next[4] = {
            static_cast<std::uint32_t>(p2 >> 32) ^ c[1] ^ k0, static_cast<std::uint32_t>(p2),
            static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<std::uint32_t>(p0)};
        std::copy(next, next + 4, c);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    std::copy(c, c + 4, out);
}

// Wichura's PPND16 (AS 241): coefficients of r^0 ... r^7, numerator and denominator of each region.
inline constexpr double quantile_tables[3][2][8] = {
    {{3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
      4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3},
     {1, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3, 2.1213794301586595867e4,
      3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3}},
    {{1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
      1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4},
     {1, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1, 1.48103976427480074590e-1,
      1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9}},
    {{6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1,
      2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7},
     {1, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2, 7.86869131145613259100e-4,
      1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15}}};

inline double horner(const double (&row)[8], double r) {
    double value = row[7];
    for (int k = 6; k >= 0; --k) value = value * r + row[k];
    return value;
}

inline double ratio(int table, double r) { return horner(quantile_tables[table][0], r) / horner(quantile_tables[table][1], r); }

// Natural logarithm of positive normal numbers, in exactly rounded operations only.
inline double exact_log(double x) {
    int exponent = 0;
    double f = std::frexp(x, &exponent);
    if (f < 0.7071067811865476) {
        f = f + f;
        --exponent;
    }
    const double s = (f - 1) / (f + 1), z = s * s;
    double series = 2.0 / 15;
    for (int odd = 13; odd >= 3; odd -= 2) series = series * z + 2.0 / odd;
    series = series * z + 2;
    return series * s + exponent * 0.6931471805599453;
}

inline double normal_quantile(double p) {
    const double q = p - 0.5;
    if (std::fabs(q) <= 0.425) return ratio(0, 0.180625 - q * q) * q;
    const double r = std::sqrt(-exact_log(std::min(p, 1 - p)));
    const double x = r <= 5 ? ratio(1, r - 1.6) : ratio(2, r - 5);
    return q < 0 ? -x : x;
}

// Sample `index` of `seed` for a float32 input named `name` that is drawn from normal(0, 1), row-major.
inline std::vector<float> normal_latent(std::uint64_t seed, std::string_view name, std::uint64_t index,
                                        std::size_t elements) {
    std::vector<float> values(elements);
    const std::uint32_t stream = stream_of(name);
    std::uint32_t words[4];
    for (std::size_t e = 0; e < elements; ++e) {
        if (e % 4 == 0) philox(seed, stream, index, static_cast<std::uint32_t>(e / 4), words);
        values[e] = static_cast<float>(normal_quantile((words[e % 4] + 0.5) * 0x1p-32));
    }
    return values;
}

}  // namespace ganexport
