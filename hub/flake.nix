{
  description = "hiar-kernels for the Hugging Face kernels hub";

  inputs.kernel-builder.url = "github:huggingface/kernels/v0.17.2";

  outputs =
    { self, kernel-builder }:
    kernel-builder.lib.genKernelFlakeOutputs {
      inherit self;
      path = ./.;
    };
}
