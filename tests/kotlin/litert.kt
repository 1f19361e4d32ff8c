// LiteRT's Kotlin API as far as the example uses it; every run hands its inputs back.
package com.google.ai.edge.litert

import android.content.res.AssetManager

enum class Accelerator { NONE, CPU, GPU, NPU }

class TensorBuffer internal constructor() {
    internal var values = FloatArray(0)

    fun writeFloat(data: FloatArray) { values = data }
    fun readFloat(): FloatArray = values
}

class CompiledModel private constructor() : AutoCloseable {
    class Options(vararg accelerators: Accelerator)

    @JvmOverloads
    fun createInputBuffers(signatureIndex: Int = 0): List<TensorBuffer> = listOf(TensorBuffer())

    @JvmOverloads
    fun createOutputBuffers(signatureIndex: Int = 0): List<TensorBuffer> = listOf(TensorBuffer())

    @JvmOverloads
    fun run(inputs: List<TensorBuffer>, outputs: List<TensorBuffer>, signatureIndex: Int = 0) {
        outputs.zip(inputs).forEach { (out, given) -> out.values = given.values }
    }

    override fun close() {}

    companion object {
        @JvmOverloads
        @JvmStatic
        fun create(assetManager: AssetManager, assetName: String, options: Options = Options(Accelerator.CPU)): CompiledModel =
            CompiledModel().also { assetManager.open(assetName).close() }
    }
}
