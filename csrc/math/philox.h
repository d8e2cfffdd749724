// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): random numbers from counters.
#pragma once
#include "common.h"

namespace rlhf {

struct Philox {
    uint32_t w[4];
};

RLHF_HD Philox philox4x32(uint32_t k0, uint32_t k1, Philox c) {
    for (int round = 0; round < 10; round++) {
        const uint64_t a = uint64_t(0xD2511F53u) * c.w[0], b = uint64_t(0xCD9E8D57u) * c.w[2];
        c = {{uint32_t(b >> 32) ^ c.w[1] ^ k0, uint32_t(b), uint32_t(a >> 32) ^ c.w[3] ^ k1, uint32_t(a)}};
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

// Return a double in [0, 1) for (seed, sequence, position), from 53 bits of the first two words.
RLHF_HD double philox_uniform(uint64_t seed, uint64_t sequence, uint64_t position) {
    const Philox counter{{uint32_t(position), uint32_t(position >> 32), uint32_t(sequence), uint32_t(sequence >> 32)}};
    const Philox r = philox4x32(uint32_t(seed), uint32_t(seed >> 32), counter);
    return double((uint64_t(r.w[0]) << 32 | r.w[1]) >> 11) * 0x1p-53;
}

}  // namespace rlhf
