// The CPU's stand-in for turned.cuh.
#pragma once

#if DTYPE != F32
struct Groups {
  const u8* first;
  int pitch;
  Groups further(int bytes) const { return {first + bytes, pitch}; }
  float at(int row, int column) const { return value_at(first + row / 8 * pitch, row % 8, column); }
};
inline Groups groups_at(const void* p, int pitch) { return {static_cast<const u8*>(p), pitch}; }

template <int COLUMNS, int N>
void multiply_groups(float (&d)[N][4], Groups a, Groups b) {
  const int g = emulated::lane() / 4, c = emulated::lane() % 4, warp = emulated::current->number / 32 % 4;
  for (int n = 0; n < N; ++n)
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 16; ++k) {
        const int m = warp * 16 + g + i / 2 * 8;
        d[n][i] += (COLUMNS ? a.at(k, m) : a.at(m, k)) * b.at(n * 8 + 2 * c + i % 2, k);
      }
}

inline void store_columns(scalar* column, u32 x, u32 y) {
  const u64 mine = u64(column);
  const emulated::Operands& all = emulated::exchange({{x, y, u32(mine), u32(mine >> 32)}});
  const int lane = emulated::lane(), row = lane % 8;
  if (lane >= 16) return;
  for (int k = 0; k < 8; ++k) {
    const u32 pair = all.of[4 * k + row / 2][lane / 8];
    column[k] = scalar(pair >> (row % 2 * 16));
  }
}
#endif
