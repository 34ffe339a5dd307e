/* The header as C99, and the example at its top. */
#include <dlcore/dlcore.h>
#include <stdio.h>
#include <string.h>

int main(void) {
  float logits[2 * 1000];
  int64_t tokens[2];
  dlcore_key key = {7, 0};
  float temperature = 0.8f;
  memset(logits, 0, sizeof logits);

  dlcore_categorical softmax = {0};
  softmax.logits.values = (dlcore_matrix){.data = logits, .rows = 2, .columns = 1000};
  softmax.temperature.data = &temperature;
  dlcore_sampling how = {0};
  how.keys.data = &key;
  if (dlcore_categorical_sample(&softmax, &how, tokens, NULL, NULL) != DLCORE_OK) {
    fprintf(stderr, "%s\n", dlcore_last_error());
    return 1;
  }
  printf("%s %d %d\n", dlcore_version(), (int)tokens[0], (int)tokens[1]);
  return 0;
}
