// What the groups of a weight lose on each of several grids. In torch every candidate is nine passes over the weight;
// here a group stays in registers and the first cache until all its candidates are judged.
#pragma once
#include <algorithm>

#include "kernel.h"

namespace {

// Of a weight [rows][groups * size] and what an error of each of its columns costs, [groups * size].
struct Groups {
  int64_t rows, groups, size;
  const float* weight;
  const float* cost;
  float top;  // the largest code
};

// A group with its costs, padded to whole vectors: what is added costs nothing, and 0 is a value of every grid.
struct Group {
  const float* weight;
  const float* cost;
  int64_t size;
};

// Code minus zero point of the nearest value, ties to the even code, as in torch.
inline Floats steps_from_zero(Floats w, Floats scale, Floats zero_point, Floats top) {
  return sub(clamp(add(round(div(w, scale)), zero_point), zero(), top), zero_point);
}

// Calls use(index of the group, group) for every group of every row.
template <class F>
void by_groups(const Groups& g, F use) {
  const int64_t padded = rounded_up(g.size, LANES), grain = std::max<int64_t>(1, 4096 / (g.groups * g.size + 1));
  run(g.rows, grain, [&](int64_t begin, int64_t end) {
    thread_local Scratch scratch;
    float* weight = scratch.get<float>(2 * padded);
    float* cost = weight + padded;
    for (int64_t row = begin; row < end; row++) {
      for (int64_t j = 0; j < g.groups; j++) {
        Group group{g.weight + (row * g.groups + j) * g.size, g.cost + j * g.size, padded};
        if (padded != g.size) {
          std::fill_n(std::copy_n(group.weight, g.size, weight), padded - g.size, 0.0f);
          std::fill_n(std::copy_n(group.cost, g.size, cost), padded - g.size, 0.0f);
          group.weight = weight, group.cost = cost;
        }
        use(row * g.groups + j, group);
      }
    }
  });
}

// scales, zeros, losses: [count][rows][groups]; losses is written: sum of cost * error^2 over the group.
void grid_losses(const Groups& g, int64_t count, const float* scales, const float* zeros, float* losses) {
  const int64_t all = g.rows * g.groups;
  const Floats top = set1(g.top);
  by_groups(g, [&](int64_t index, const Group& group) {
    for (int64_t at = index; at < count * all; at += all) {
      const Floats scale = set1(scales[at]), zero_point = set1(zeros[at]);
      Floats loss = zero();
      for (int64_t i = 0; i < group.size; i += LANES) {
        const Floats w = load(group.weight + i);
        const Floats error = sub(mul(steps_from_zero(w, scale, zero_point, top), scale), w);
        loss = fma(mul(error, load(group.cost + i)), error, loss);
      }
      losses[at] = sum(loss);
    }
  });
}

// With c the codes minus the zero point: sum of cost * c^2 and of cost * c * weight, all [rows][groups].
void grid_moments(const Groups& g, const float* scales, const float* zeros, float* squares, float* products) {
  const Floats top = set1(g.top);
  by_groups(g, [&](int64_t index, const Group& group) {
    const Floats scale = set1(scales[index]), zero_point = set1(zeros[index]);
    Floats square = zero(), product = zero();
    for (int64_t i = 0; i < group.size; i += LANES) {
      const Floats w = load(group.weight + i), c = steps_from_zero(w, scale, zero_point, top);
      const Floats weighed = mul(c, load(group.cost + i));
      square = fma(weighed, c, square);
      product = fma(weighed, w, product);
    }
    squares[index] = sum(square), products[index] = sum(product);
  });
}

}  // namespace
