"""What torch 2.11.0, the oldest version that is allowed, offers of what runs on a CUDA device alone.

Copied from the package of that release: `native_functions.yaml` of torchgen, and the names in its Python modules.
"""

OPERATORS: tuple[str, ...] = (
    "_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? "
    "cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, "
    "float? scale=None, SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? "
    "seqused_k=None, Tensor? alibi_slopes=None) -> (Tensor output, Tensor softmax_logsumexp, Tensor "
    "rng_state, Tensor unused, Tensor debug_attn_mask)",
    "_flash_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, "
    "Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
    "bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None, SymInt? "
    "window_size_left=None, SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)",
    "_efficient_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? "
    "cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, float dropout_p, "
    "int custom_mask_type, bool compute_log_sumexp=False, *, float? scale=None, Tensor? seqlen_k=None, "
    "int? window_size=None) -> (Tensor output, Tensor logsumexp, Tensor philox_seed, Tensor "
    "philox_offset, SymInt max_seqlen_batch_q, SymInt max_seqlen_batch_k)",
    "_efficient_attention_backward(Tensor grad_out_, Tensor query, Tensor key, Tensor value, Tensor? "
    "bias, Tensor out, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt "
    "max_seqlen_k, Tensor logsumexp, float dropout_p, Tensor philox_seed, Tensor philox_offset, int "
    "custom_mask_type, bool bias_requires_grad, *, float? scale=None, int? num_splits_key=None, int? "
    "window_size=None, bool shared_storage_dqdkdv=False) -> (Tensor, Tensor, Tensor, Tensor)",
    "scaled_dot_product_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, float "
    "dropout_p=0.0, bool is_causal=False, *, float? scale=None, bool enable_gqa=False) -> Tensor",
    "_nested_view_from_jagged(Tensor(a) self, Tensor offsets, Tensor dummy, Tensor? lengths=None, int "
    "ragged_idx=1, Tensor? min_seqlen=None, Tensor? max_seqlen=None) -> Tensor(a)",
    "_fused_adamw_(Tensor(a!)[] self, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] "
    "exp_avg_sqs, Tensor(e!)[] max_exp_avg_sqs, Tensor[] state_steps, *, float lr, float beta1, float "
    "beta2, float weight_decay, float eps, bool amsgrad, bool maximize, Tensor? grad_scale=None, Tensor? "
    "found_inf=None) -> ()",
    "_fused_adamw_.tensor_lr(Tensor(a!)[] self, Tensor(b!)[] grads, Tensor(c!)[] exp_avgs, Tensor(d!)[] "
    "exp_avg_sqs, Tensor(e!)[] max_exp_avg_sqs, Tensor[] state_steps, *, Tensor lr, float beta1, float "
    "beta2, float weight_decay, float eps, bool amsgrad, bool maximize, Tensor? grad_scale=None, Tensor? "
    "found_inf=None) -> ()",
    "_foreach_norm.Scalar(Tensor[] self, Scalar ord=2, ScalarType? dtype=None) -> Tensor[]",
    "_foreach_mul_.Tensor(Tensor(a!)[] self, Tensor other) -> ()",
    "_foreach_copy_(Tensor(a!)[] self, Tensor[] src, bool non_blocking=False) -> ()",
    "_amp_foreach_non_finite_check_and_unscale_(Tensor(a!)[] self, Tensor(b!) found_inf, Tensor inv_scale) -> ()",
    "_amp_update_scale_(Tensor(a!) self, Tensor(b!) growth_tracker, Tensor found_inf, float "
    "scale_growth_factor, float scale_backoff_factor, int growth_interval) -> Tensor(a!)",
)
"""Schemas of the operators that are called on a CUDA device alone, here or by torch and Lightning for this package."""

NAMES = {
    "_C": {"_cuda_clearCublasWorkspaces"},
    "accelerator": {"synchronize"},
    "amp": {"GradScaler"},
    "backends.cuda": {"is_flash_attention_available"},
    "backends.cuda.matmul": {"fp32_precision"},
    "backends.cudnn": {"benchmark", "is_available"},
    "backends.mps": {"is_available"},
    "cuda": {
        *("default_generators", "device_count", "empty_cache", "get_device_capability", "get_device_name"),
        *("get_device_properties", "get_rng_state_all", "is_available", "is_initialized", "max_memory_allocated"),
        *("max_memory_reserved", "mem_get_info", "memory_allocated", "memory_reserved", "reset_peak_memory_stats"),
        *("set_per_process_memory_fraction", "set_rng_state_all", "synchronize"),
    },
    "mps": {"manual_seed"},
    "nested": {"nested_tensor_from_jagged"},
}
"""Names in its modules that this package uses."""
