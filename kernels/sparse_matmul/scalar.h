// One weight at a time, for any processor.

struct Vectors {
  static constexpr int STEP = 8, REGISTERS = 16;
  struct Floats {
    float lane[STEP];
  };
  template <class T>
  struct Numbers {
    using X = float;
    using Piece = Floats;
    static constexpr int PARTS = 1;
  };
  struct Expanded {
    Floats part[1];
  };

  static Floats zero() { return {}; }
  static Floats load(const float* from) {
    Floats x;
    memcpy(&x, from, sizeof(x));
    return x;
  }
  static void store(float* to, const Floats& x) { memcpy(to, &x, sizeof(x)); }
  static Floats fma(const Floats& a, const Floats& b, Floats c) {
    for (int i = 0; i < STEP; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  static float sum(const Floats& x) {
    float total = 0.0f;
    for (float one : x.lane) total += one;
    return total;
  }
  static void hold(Floats&) {}
  static uint32_t bits(const uint8_t* from) { return *from; }
  static int count(uint32_t bits) {
    int set = 0;
    for (; bits != 0; bits &= bits - 1) ++set;
    return set;
  }
  template <class T>
  static int place(int c) {
    return c;
  }
  template <class T>
  static Expanded expand(const T* values, uint32_t bits) {
    Expanded x{};
    for (int c = 0; c < STEP; ++c)
      if (bits >> c & 1) x.part[0].lane[c] = widened(*values++);
    return x;
  }
};
