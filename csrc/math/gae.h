// Generalised advantage estimation (Schulman et al. 2016, eq. 16), one step, for a float or for a vector of them.
#pragma once
#include "common.h"

namespace rlhf {

// δ_t = r_t + γ V_{t+1} - V_t
template <class F>
RLHF_HD F td_error(F reward, F value, F next_value, float gamma) {
    return reward + gamma * next_value - value;
}

// A_t = δ_t + γλ A_{t+1}; over a distance of d steps, `decay` is (γλ)^d.
template <class F, class D>
RLHF_HD F discounted(F delta, D decay, F later) {
    return delta + decay * later;
}

}  // namespace rlhf
