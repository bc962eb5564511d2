"""Files: steering, vectors and captured rows on disk.

spec_json        a SteeringSpec as JSON text
checkpoint       a folder that holds steering
vector_files     vectors of other projects: every kind of file, read and written
layouts/         layouts of vectors that other projects write, recognised by their content
layer_vectors    vectors by layer, and what the layers of each kind of file mean
gguf_vectors     control vectors in GGUF files
torch_vectors    files of `torch.save`, read as a tree of arrays, and written
legacy           the folders of the in-process steerllm
torch_file       files of `torch.save`, read without running code
safetensors_file safetensors files through NumPy
unique_json      JSON without a name twice
zip_entries      entries of archives that would fill the memory
capture_dataset  the folder that `steer capture` writes
atomic_write     a file that appears complete or not at all
"""
