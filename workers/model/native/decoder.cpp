// What a library of one instruction set exports: functions of C, for ctypes (library.py).
//
// The caller (decoder.py) checks every index and keeps every pointer alive; nothing is checked here.
// Invariant: no exception leaves it. All else is in headers, for it is compiled in one piece, once for
// each instruction set (setup.py).
#include "decoder.h"

extern "C" {

int onecopy_request_registers() { return request_registers(); }
// For a check that both sides mean the same: sizes of the structures.
int onecopy_size_of_layer() { return sizeof(LayerSpec); }
int onecopy_size_of_decoder() { return sizeof(DecoderSpec); }
int onecopy_size_of_call() { return sizeof(Call); }

void* onecopy_decoder_create(const DecoderSpec* spec) {
  try {
    return new Decoder(*spec);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}
int64_t onecopy_decoder_workspace_bytes(void* decoder) {
  return int64_t(((Decoder*)decoder)->workspace_bytes());
}
// Elements from one row of the residual stream to the next.
int64_t onecopy_decoder_hidden_stride(void* decoder) { return ((Decoder*)decoder)->hidden_stride(); }
// 0, or 1 if no thread can be started, or 2 where the ranks can't go on.
int onecopy_decoder_forward(void* decoder, Call* call) {
  try {
    if (!((Decoder*)decoder)->forward(*call)) return 1;
    return call->outcome.result ? 2 : 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
void onecopy_decoder_counted(void* decoder, uint64_t* out) {
  for (int i = 0; i < kNumTimed; i++) out[i] = ((Decoder*)decoder)->counted(i);
}
void onecopy_decoder_destroy(void* decoder) { delete (Decoder*)decoder; }

}  // extern "C"
