// prepare_decode: all that a step of generation requests needs, from each one's row and last position.
//
// Shapes: rows, last, advance, input_ids, positions, targets, slots int64 [n]; last goes on by advance; kv_lens int32 [n]; tables int32 [n, width]; tokens
//   int32 [rows, max_model_len]; blocks int32 [rows, width], rows block_stride apart.
// Launch: block THREADS, grid n: one request a block.
#include "common.cuh"

#ifndef THREADS
#define THREADS 128
#endif

extern "C" __global__ void __launch_bounds__(THREADS)
    prepare_decode(i64* input_ids, i64* positions, i64* targets, i64* slots, int* kv_lens, int* tables,
                   const i64* rows, i64* last, const i64* advance, const int* tokens, const int* blocks,
                   i64 block_stride, i64 max_model_len, int block_size, int width) {
  follow();
  const int i = blockIdx.x;
  const i64 row = rows[i];
  const int* source = blocks + row * block_stride;
  if (threadIdx.x == 0) {
    const i64 position = last[i];
    last[i] = position + advance[i];
    positions[i] = position;
    const i64 place = row * max_model_len + position;
    input_ids[i] = tokens[place];
    targets[i] = place + 1;
    slots[i] = i64(source[position / block_size]) * block_size + position % block_size;
    kv_lens[i] = int(position) + 1;
  }
  for (int block = threadIdx.x; block < width; block += THREADS) tables[i64(i) * width + block] = source[block];
}
