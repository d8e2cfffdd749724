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

// What the step behind leaves to the one in front of it: its advantage and its value.
struct GaeState {
    float advantage, value;
};

RLHF_HD GaeState gae_step(float reward, float value, GaeState behind, float gamma, float decay) {
    return {discounted(td_error(reward, value, behind.value, gamma), decay, behind.advantage), value};
}

// A run of steps as one: A = sum + next * V + decay * A' for the state (A', V) behind it; V of its first step is `value`.
// Without steps it changes nothing, whatever the state holds: 0 * inf would be NaN.
struct GaeSegment {
    float decay, next, sum, value;
    bool steps;
};

// One more step in front of a run.
RLHF_HD GaeSegment gae_prepend(float reward, float value, const GaeSegment& s, float gamma, float decay) {
    if (!s.steps) return {decay, gamma, reward - value, value, true};
    return {decay * s.decay, decay * s.next, discounted(td_error(reward, value, s.value, gamma), decay, s.sum), value, true};
}

RLHF_HD GaeState gae_apply(const GaeSegment& s, GaeState behind) {
    if (!s.steps) return behind;
    return {s.sum + s.next * behind.value + s.decay * behind.advantage, s.value};
}

// The run `front`, then the run `behind`.
RLHF_HD GaeSegment gae_join(const GaeSegment& front, const GaeSegment& behind) {
    if (!front.steps) return behind;
    if (!behind.steps) return front;
    return {front.decay * behind.decay, front.decay * behind.next,
            front.sum + front.next * behind.value + front.decay * behind.sum, front.value, true};
}

}  // namespace rlhf
