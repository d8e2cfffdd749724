// One step of generalised advantage estimation (Schulman et al. 2016, eq. 16), for a float or a vector of floats, and its
// composition over consecutive steps for a parallel scan.
#pragma once
#include "common.h"

namespace rlhf {

// δ_t = r_t + γ V_{t+1} - V_t
template <class F>
RLHF_HD F td_error(F reward, F value, F next_value, float gamma) {
    return reward + gamma * next_value - value;
}

// A_t = δ_t + γλ A_{t+1}; for a distance of d steps, `decay` is (γλ)^d.
template <class F, class D>
RLHF_HD F discounted(F delta, D decay, F later) {
    return delta + decay * later;
}

// Advantage and value of a step, from which the preceding step is computed.
struct GaeState {
    float advantage, value;
};

RLHF_HD GaeState gae_step(float reward, float value, GaeState after, float gamma, float decay) {
    return {discounted(td_error(reward, value, after.value, gamma), decay, after.advantage), value};
}

// The composition of consecutive steps. If (A', V') is the state of the step after the segment, the advantage of the segment's
// first step is A = sum + next * V' + decay * A', and that step's value is `value`. An empty segment (`steps` is false) returns
// the state unchanged; this is a branch, because arithmetic would turn an infinite state into NaN (0 * inf).
struct GaeSegment {
    float decay, next, sum, value;
    bool steps;
};

// Return the segment that consists of one step and then `s`.
RLHF_HD GaeSegment gae_prepend(float reward, float value, const GaeSegment& s, float gamma, float decay) {
    if (!s.steps) return {decay, gamma, reward - value, value, true};
    return {decay * s.decay, decay * s.next, discounted(td_error(reward, value, s.value, gamma), decay, s.sum), value, true};
}

// Return the state of the segment's first step; `after` is the state of the step after the segment.
RLHF_HD GaeState gae_apply(const GaeSegment& s, GaeState after) {
    if (!s.steps) return after;
    return {s.sum + s.next * after.value + s.decay * after.advantage, s.value};
}

// Return the segment `front` followed by the segment `after`.
RLHF_HD GaeSegment gae_join(const GaeSegment& front, const GaeSegment& after) {
    if (!front.steps) return after;
    if (!after.steps) return front;
    return {front.decay * after.decay, front.decay * after.next,
            front.sum + front.next * after.value + front.decay * after.sum, front.value, true};
}

}  // namespace rlhf
