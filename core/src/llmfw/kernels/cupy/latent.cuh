// Shared by latent_attention.cu, latent_tiles.cu and merge_latent.cu: how a request's keys are divided.
#pragma once

#ifndef HEAD_DIM
#define HEAD_DIM 576
#endif
#ifndef V_DIM
#define V_DIM 512
#endif
#ifndef HEADS
#define HEADS 16
#endif
#ifndef ROWS
#define ROWS 16
#endif
#ifndef KEYS
#define KEYS 32
#endif

// A request's keys as the row tile sees them, and the part of them that is one split's.
struct Share {
  int q_start, rows, past, last, from, stop, active;  // keys 0 .. past - 1 are older than the request's queries
};

__device__ __forceinline__ Share share_of(const int* cu_query_lens, const int* kv_lens, int request, int row0,
                                          int split, int splits, int least_share) {
  Share x;
  x.q_start = cu_query_lens[request];
  const int q_len = cu_query_lens[request + 1] - x.q_start;
  const int kv_len = max(kv_lens[request], q_len);
  x.rows = q_len * HEADS;
  x.past = kv_len - q_len;
  x.last = x.past + (min(row0 + ROWS, x.rows) - 1) / HEADS;  // the last key that a row sees
  const int tiles = x.last / KEYS + 1;
  const int share = max((tiles + splits - 1) / splits, least_share);
  x.active = (tiles + share - 1) / share;
  x.from = split * share;
  x.stop = min(x.from + share, tiles);
  return x;
}
