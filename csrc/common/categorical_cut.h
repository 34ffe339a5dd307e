// The search for the last entry that a truncated draw keeps, on the host or a device.
#pragma once

#include <cmath>

#include "categorical.h"
#include "numbers.h"

namespace dlcore {

// `within`: an earlier selection by count alone; max_mass is then a part of the mass that it keeps.
DLCORE_HD inline Selection start_selection(const Summary& state, PerRow<int64_t> top_k, PerRow<float> top_p,
                                           const Selection* within, int64_t r) {
  const double total = within && !within->everything ? within->mass : state.sum;
  return {top_k ? top_k[r] : INT64_MAX, top_p ? top_p[r] * total : kInfinity};
}

// The bits of a float as a word that grows with it.
DLCORE_HD inline uint32_t ordered(float x) {
  const uint32_t b = bits_of(x);
  return b & 0x80000000u ? ~b : b | 0x80000000u;
}

// Entries of probability below 1/V-th of what may be dropped are dropped: together they fit.
DLCORE_HD inline float floor_by_mass(const Summary& s, const Selection& selection, int64_t vocab,
                                     float inverse_temperature) {
  const double rest = (s.sum - selection.max_mass) / static_cast<double>(vocab);
  constexpr double slack = 1e-3;
  return rest > 0 ? static_cast<float>((s.top + std::log(rest) - slack) / inverse_temperature)
                  : static_cast<float>(-kInfinity);
}

DLCORE_HD constexpr int64_t most_digit(int level) { return level < kLevels - 1 ? 0x7FF : 0x3FF; }

// Finds the digit of the last kept entry among a row's bins from b down; what is above b has been counted.
DLCORE_HD inline void narrow_row(const Bin* row, int64_t b, int level, Selection& s) {
  for (; b >= 0; --b) {
    if (s.count + row[b].count >= s.max_count || s.mass + row[b].mass > s.max_mass) break;
    s.count += row[b].count;
    s.mass += row[b].mass;
  }
  s.everything = b < 0;
  if (b >= 0) s.prefix |= static_cast<uint32_t>(b) << level_shift(level);
  if (level < kLevels - 1 || b < 0 || row[b].count == 0) return;
  // All entries of the last bin are equal: keep as many of them as both limits allow.
  const double each = row[b].mass / static_cast<double>(row[b].count);
  const double by_mass = each > 0 ? std::floor((s.max_mass - s.mass) / each) + 1 : kInfinity;
  const int64_t room = s.max_count - s.count;
  int64_t ties = row[b].count < room ? row[b].count : room;
  if (by_mass < static_cast<double>(ties)) ties = static_cast<int64_t>(by_mass);
  s.mass += static_cast<double>(ties) * each;
  s.max_count = s.count + ties;
}

// `selection` is null where min_p alone cuts.
DLCORE_HD inline Cut finish_selection(const Summary& state, PerRow<float> min_p, PerRow<float> temperature,
                                      const Selection* selection, int64_t r) {
  Cut cut{static_cast<float>(-kInfinity), INT64_MAX};
  if (selection && !selection->everything) {
    const uint32_t bits = selection->prefix;
    cut = {float_of(bits & 0x80000000u ? bits & 0x7FFFFFFFu : ~bits),
           selection->max_count - selection->count};
  }
  if (!min_p || !(min_p[r] > 0)) return cut;
  // The summary is scaled by the rounded 1/temperature; undone with the same number, the largest entry is
  // exact.
  const double inverse = temperature && temperature[r] > 0 ? 1.0f / temperature[r] : 1.0f;
  const auto bound = static_cast<float>((state.top + std::log(static_cast<double>(min_p[r]))) / inverse);
  // Entries equal to the bound are kept, so the threshold lies just below it.
  const float under = nextafterf(bound, static_cast<float>(-kInfinity));
  if (under > cut.threshold || (under == cut.threshold && cut.ties > 0)) cut = {under, 0};
  return cut;
}

}  // namespace dlcore
