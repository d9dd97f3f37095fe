// wgmma.mma_async for every width of a tile: d[64 x 8 N] += a[64 x 16] b[8 N x 16]^T. The instruction's shape, its
// registers and the numbers of its operands depend on N, and assembly has no loops: hence one line for each N.
#pragma once

#if DTYPE == BF16
#define PRODUCT(columns) "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 "
#else
#define PRODUCT(columns) "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.f16.f16 "
#endif
#define FOUR(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])

// The names of the registers of the first N groups of 8 columns.
#define NAMES_1 "%0,%1,%2,%3"
#define NAMES_2 NAMES_1 ",%4,%5,%6,%7"
#define NAMES_3 NAMES_2 ",%8,%9,%10,%11"
#define NAMES_4 NAMES_3 ",%12,%13,%14,%15"
#define NAMES_5 NAMES_4 ",%16,%17,%18,%19"
#define NAMES_6 NAMES_5 ",%20,%21,%22,%23"
#define NAMES_7 NAMES_6 ",%24,%25,%26,%27"
#define NAMES_8 NAMES_7 ",%28,%29,%30,%31"
#define NAMES_9 NAMES_8 ",%32,%33,%34,%35"
#define NAMES_10 NAMES_9 ",%36,%37,%38,%39"
#define NAMES_11 NAMES_10 ",%40,%41,%42,%43"
#define NAMES_12 NAMES_11 ",%44,%45,%46,%47"
#define NAMES_13 NAMES_12 ",%48,%49,%50,%51"
#define NAMES_14 NAMES_13 ",%52,%53,%54,%55"
#define NAMES_15 NAMES_14 ",%56,%57,%58,%59"
#define NAMES_16 NAMES_15 ",%60,%61,%62,%63"
#define NAMES_17 NAMES_16 ",%64,%65,%66,%67"
#define NAMES_18 NAMES_17 ",%68,%69,%70,%71"
#define NAMES_19 NAMES_18 ",%72,%73,%74,%75"
#define NAMES_20 NAMES_19 ",%76,%77,%78,%79"
#define NAMES_21 NAMES_20 ",%80,%81,%82,%83"
#define NAMES_22 NAMES_21 ",%84,%85,%86,%87"
#define NAMES_23 NAMES_22 ",%88,%89,%90,%91"
#define NAMES_24 NAMES_23 ",%92,%93,%94,%95"
#define NAMES_25 NAMES_24 ",%96,%97,%98,%99"
#define NAMES_26 NAMES_25 ",%100,%101,%102,%103"
#define NAMES_27 NAMES_26 ",%104,%105,%106,%107"
#define NAMES_28 NAMES_27 ",%108,%109,%110,%111"
#define NAMES_29 NAMES_28 ",%112,%113,%114,%115"
#define NAMES_30 NAMES_29 ",%116,%117,%118,%119"
#define NAMES_31 NAMES_30 ",%120,%121,%122,%123"
#define NAMES_32 NAMES_31 ",%124,%125,%126,%127"

// The registers.
#define SUMS_1 FOUR(d[0])
#define SUMS_2 SUMS_1, FOUR(d[1])
#define SUMS_3 SUMS_2, FOUR(d[2])
#define SUMS_4 SUMS_3, FOUR(d[3])
#define SUMS_5 SUMS_4, FOUR(d[4])
#define SUMS_6 SUMS_5, FOUR(d[5])
#define SUMS_7 SUMS_6, FOUR(d[6])
#define SUMS_8 SUMS_7, FOUR(d[7])
#define SUMS_9 SUMS_8, FOUR(d[8])
#define SUMS_10 SUMS_9, FOUR(d[9])
#define SUMS_11 SUMS_10, FOUR(d[10])
#define SUMS_12 SUMS_11, FOUR(d[11])
#define SUMS_13 SUMS_12, FOUR(d[12])
#define SUMS_14 SUMS_13, FOUR(d[13])
#define SUMS_15 SUMS_14, FOUR(d[14])
#define SUMS_16 SUMS_15, FOUR(d[15])
#define SUMS_17 SUMS_16, FOUR(d[16])
#define SUMS_18 SUMS_17, FOUR(d[17])
#define SUMS_19 SUMS_18, FOUR(d[18])
#define SUMS_20 SUMS_19, FOUR(d[19])
#define SUMS_21 SUMS_20, FOUR(d[20])
#define SUMS_22 SUMS_21, FOUR(d[21])
#define SUMS_23 SUMS_22, FOUR(d[22])
#define SUMS_24 SUMS_23, FOUR(d[23])
#define SUMS_25 SUMS_24, FOUR(d[24])
#define SUMS_26 SUMS_25, FOUR(d[25])
#define SUMS_27 SUMS_26, FOUR(d[26])
#define SUMS_28 SUMS_27, FOUR(d[27])
#define SUMS_29 SUMS_28, FOUR(d[28])
#define SUMS_30 SUMS_29, FOUR(d[29])
#define SUMS_31 SUMS_30, FOUR(d[30])
#define SUMS_32 SUMS_31, FOUR(d[31])

// The instruction of 8 N columns, whose operands after the sums are the tiles, then: add to d, with signs as they are,
// both tiles by rows.
#define WIDTH(n, columns, first, second)                                                                      \
  if constexpr (N == n)                                                                                       \
  asm volatile(PRODUCT(columns) "{" NAMES_##n "}, %" #first ", %" #second ", 1, 1, 1, 0, 0;"                  \
               : SUMS_##n                                                                                     \
               : "l"(a), "l"(b))

template <int N>
__device__ __forceinline__ void multiply_tile(float (&d)[N][4], u64 a, u64 b) {
  static_assert(1 <= N && N <= 32, "8 to 256 columns");
  WIDTH(1, 8, 4, 5);
  WIDTH(2, 16, 8, 9);
  WIDTH(3, 24, 12, 13);
  WIDTH(4, 32, 16, 17);
  WIDTH(5, 40, 20, 21);
  WIDTH(6, 48, 24, 25);
  WIDTH(7, 56, 28, 29);
  WIDTH(8, 64, 32, 33);
  WIDTH(9, 72, 36, 37);
  WIDTH(10, 80, 40, 41);
  WIDTH(11, 88, 44, 45);
  WIDTH(12, 96, 48, 49);
  WIDTH(13, 104, 52, 53);
  WIDTH(14, 112, 56, 57);
  WIDTH(15, 120, 60, 61);
  WIDTH(16, 128, 64, 65);
  WIDTH(17, 136, 68, 69);
  WIDTH(18, 144, 72, 73);
  WIDTH(19, 152, 76, 77);
  WIDTH(20, 160, 80, 81);
  WIDTH(21, 168, 84, 85);
  WIDTH(22, 176, 88, 89);
  WIDTH(23, 184, 92, 93);
  WIDTH(24, 192, 96, 97);
  WIDTH(25, 200, 100, 101);
  WIDTH(26, 208, 104, 105);
  WIDTH(27, 216, 108, 109);
  WIDTH(28, 224, 112, 113);
  WIDTH(29, 232, 116, 117);
  WIDTH(30, 240, 120, 121);
  WIDTH(31, 248, 124, 125);
  WIDTH(32, 256, 128, 129);
}
