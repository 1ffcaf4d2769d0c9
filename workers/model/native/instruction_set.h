// Which ways of multiplying the instruction set has that this is compiled for.
//
// Owns the choice; all behind it is written in these names alone, but for the calls to tiles, which
// only AMX has.
#pragma once
#if defined(__AVX512BF16__)
#include "pairs.h"
#include "pairs_attention.h"
using Vectors = Pairs;
using VectorsAttention = PairsAttention;
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include "pairs_attention.h"
#include "squares.h"
using Vectors = Squares;
using VectorsAttention = PairsAttention;
#else
#include "floats.h"
using Vectors = Floats;
using VectorsAttention = FloatsAttention;
#endif
#if defined(SET_AMX)
#include "tiles.h"
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif
constexpr bool kWidens = sizeof(Vectors::Element) == 4;
