// Draws a token per row of logits, as an engine would after each forward pass: draw ROWS VOCAB SEED.
//
// What stands in for a model's logits are normal numbers of a key, so that Python can draw the same tokens.
#include <dlcore/dlcore.h>

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

namespace {

void check(dlcore_status status) {
  if (status != DLCORE_OK) throw std::runtime_error(dlcore_last_error());
}

std::vector<float> model(int64_t rows, int64_t vocab) {
  std::vector<float> logits(static_cast<size_t>(rows * vocab));
  const dlcore_key key{1, 0};
  check(dlcore_rng_normal(&key, 1, rows * vocab, DLCORE_FLOAT32, logits.data(), 0));
  return logits;
}

struct Draw {
  std::vector<int64_t> tokens;
  std::vector<float> numbers;  // (DLCORE_NUM_SAMPLE_STATS, rows)
};

Draw draw(const std::vector<float>& logits, int64_t rows, dlcore_key key) {
  const float temperature = 0.8f, top_p = 0.95f;
  dlcore_categorical softmax{};
  softmax.logits.values.data = logits.data();
  softmax.logits.values.rows = rows;
  softmax.logits.values.columns = static_cast<int64_t>(logits.size()) / rows;
  softmax.temperature.data = &temperature;
  dlcore_sampling how{};
  how.keys.data = &key;
  how.top_p.data = &top_p;
  const auto n = static_cast<size_t>(rows);
  Draw result{std::vector<int64_t>(n), std::vector<float>(n * DLCORE_NUM_SAMPLE_STATS)};
  check(dlcore_categorical_sample(&softmax, &how, result.tokens.data(), nullptr, result.numbers.data()));
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return std::fprintf(stderr, "usage: draw ROWS VOCAB SEED\n"), 2;
  const int64_t rows = std::atoll(argv[1]), vocab = std::atoll(argv[2]);
  try {
    const Draw drawn = draw(model(rows, vocab), rows, {std::atoll(argv[3]), 0});
    for (int64_t r = 0; r < rows; ++r)
      std::printf("%lld %.9g %.9g\n", static_cast<long long>(drawn.tokens[static_cast<size_t>(r)]),
                  static_cast<double>(drawn.numbers[static_cast<size_t>(DLCORE_TOKEN_LOGPROB * rows + r)]),
                  static_cast<double>(drawn.numbers[static_cast<size_t>(DLCORE_ENTROPY * rows + r)]));
  } catch (const std::exception& error) {
    return std::fprintf(stderr, "%s\n", error.what()), 1;
  }
}
