// penalise: repetition, presence and frequency penalties on the logits of tokens that a sequence has.
//
// Shapes: logits float32 [rows, vocab], rows `stride` apart, written; rows, sequences, lens, prompt_lens int64 [n]: the
//   row of the logits, the row of the tokens, how many there are and how many of them are the prompt's; tokens int32
//   [all, width]; strengths float32 [3, n]: repetition, presence, frequency; table int2 [n, slots], zeros, with slots a
//   power of two greater than any length.
// Launch: block THREADS, grid n: one sequence a block. It counts its tokens in a hash table of its own, then goes
//   through the table.
// Numbers: rounded one by one, as torch does.
#include "common.cuh"

#ifndef THREADS
#define THREADS 1024
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    penalise(float* logits, const i64* rows, const i64* sequences, const int* tokens, const i64* lens,
             const i64* prompt_lens, const float* strengths, int2* table, i64 stride, i64 width, int slots) {
  follow();
  const int index = blockIdx.x, count = gridDim.x;
  const int* history = tokens + sequences[index] * width;
  const i64 length = lens[index], prompt = prompt_lens[index];
  table += i64(index) * slots;
  for (int i = threadIdx.x; i < length; i += THREADS) {
    const int token = history[i] + 1;  // 0 is an empty slot
    int slot = u32(token) * 2654435769u & (slots - 1);
    while (true) {
      const int there = atomicCAS(&table[slot].x, 0, token);
      if (there == 0 || there == token) break;
      slot = (slot + 1) & (slots - 1);
    }
    if (i >= prompt) atomicAdd(&table[slot].y, 1);
  }
  __syncthreads();

  const float repetition = strengths[index], presence = strengths[count + index],
              frequency = strengths[2 * count + index];
  float* row = logits + rows[index] * stride;
  for (int i = threadIdx.x; i < slots; i += THREADS) {
    const int2 seen = __ldcg(table + i);
    if (seen.x == 0) continue;
    float x = row[seen.x - 1];
    x = x > 0 ? x / repetition : __fmul_rn(x, repetition);
    x = __fsub_rn(x, __fmul_rn(frequency, float(seen.y)));
    if (seen.y > 0) x = __fsub_rn(x, presence);
    row[seen.x - 1] = x;
  }
}
