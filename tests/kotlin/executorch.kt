// ExecuTorch's Android API as far as the example uses it; every run hands its inputs back.
package org.pytorch.executorch

abstract class Tensor {
    abstract val dataAsFloatArray: FloatArray

    companion object {
        @JvmStatic
        fun fromBlob(data: FloatArray, shape: LongArray): Tensor = object : Tensor() {
            override val dataAsFloatArray: FloatArray = data.also { require(it.size.toLong() == shape.fold(1L, Long::times)) }
        }
    }
}

class EValue private constructor(private val tensor: Tensor) {
    fun toTensor(): Tensor = tensor

    companion object {
        @JvmStatic
        fun from(tensor: Tensor): EValue = EValue(tensor)
    }
}

open class Module private constructor(private val path: String) {
    open fun forward(vararg inputs: EValue): Array<EValue> = arrayOf(*inputs)
    open fun destroy() {}

    companion object {
        @JvmStatic
        @JvmOverloads
        fun load(modelPath: String?, loadMode: Int = 0, numThreads: Int = 0): Module = Module(modelPath!!)
    }
}
